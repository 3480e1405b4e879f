"""Tokens to text piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_WAIT = 4  # tokens until a character is complete: it has at most four bytes, each a token


class TextStream:
    """The text of an answer while it grows.

    Text is held back while its last character is incomplete, and while it may be the beginning of a stop string. The
    stop string itself, and what follows, is left out.

    Args:
        decode: tokens to text; called with the last few.
        stops: strings that end the answer.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._before: list[int] = []  # the tokens decoded last, as a tokenizer drops a space at the front of a text
        self._fresh: list[int] = []  # tokens whose text is not given yet
        self._held = ""
        self.has_stopped = False

    def add_token(self, token: int) -> str:
        """The text that is certain by now and was not given before."""
        self._fresh.append(token)
        text = self._decode([*self._before, *self._fresh])
        if text.endswith(REPLACEMENT) and len(self._fresh) < LONGEST_WAIT:
            return ""
        return self._give(self._take_fresh(text), is_last=False)

    def finish(self) -> str:
        """The text that was held back."""
        text = self._decode([*self._before, *self._fresh]) if self._fresh else ""
        return self._give(self._take_fresh(text) if self._fresh else "", is_last=True)

    def _take_fresh(self, text: str) -> str:
        new = text[len(self._decode(self._before)) :] if self._before else text
        self._before, self._fresh = self._fresh, []
        return new

    def _give(self, new: str, is_last: bool) -> str:
        if self.has_stopped:
            return ""
        self._held += new
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.has_stopped = bool(found)
        keep = 0 if is_last or found else self._count_stop_start()
        given = self._held[: min(found)] if found else self._held[: len(self._held) - keep]
        self._held = "" if found else self._held[len(given) :]
        return given

    def _count_stop_start(self) -> int:
        """The characters at the end that may begin a stop string."""
        lengths = range(min(len(self._held), max(map(len, self._stops), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)
