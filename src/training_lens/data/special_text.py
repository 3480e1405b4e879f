"""Keep names of special tokens in data as plain text while a template renders them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from training_lens.data.examples import Message, TextSegment

# While a template renders, a name is replaced by (mark, number, mark). The marks are Unicode noncharacters, which no
# template knows; in ASCII JSON they are escaped.
OPEN, CLOSE, ESCAPED = "\ufdd0", "\ufdd1", r"\ufdd0"
_PLACEHOLDER = re.compile(rf"(?:{OPEN}|\\ufdd0)(\d+)(?:{CLOSE}|\\ufdd1)")
# Anything that looks like a special token of some tokenizer.
_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|</s>|<(?:start|end)_of_[a-z]+>")


def find_foreign_marks(texts: Iterable[str], tokens: Collection[str]) -> list[str]:
    """Strings in the texts that look like special tokens but are not in `tokens`, sorted."""
    return sorted({mark for text in texts if "<" in text for mark in _MARK.findall(text)}.difference(tokens))


class SpecialText:
    """Replaces names of special tokens in texts by placeholders, and restores them as plain text.

    Args:
        names: the special tokens; if empty, names in data become tokens.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = sorted(names, key=len, reverse=True)  # the longest first: one may begin another
        self._found = re.compile("|".join(map(re.escape, self._names))) if names else None

    @property
    def are_tokens(self) -> bool:
        """Whether names in data become tokens."""
        return self._found is None

    def protect_text(self, text: str) -> str:
        """`text` with the names as placeholders."""
        if self._found is None or not self._found.search(text):
            return text
        return self._found.sub(lambda name: f"{OPEN}{self._names.index(name[0])}{CLOSE}", text)

    def protect_messages(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with the names protected, in texts and calls."""
        return [self._protect_message(m) for m in messages] if self._found else messages

    def _protect_message(self, m: Message) -> Message:
        assert self._found
        if not (m.calls or self._found.search(m.text) or self._found.search(m.input)):
            return m  # nearly every message; copying it would take as long as rendering it
        calls = tuple(self.protect_value(call) for call in m.calls)
        return replace(m, text=self.protect_text(m.text), input=self.protect_text(m.input), calls=calls)

    def protect_value(self, value: Any) -> Any:
        """`value` with every text in it protected."""
        if isinstance(value, str):
            return self.protect_text(value)
        if isinstance(value, Mapping):
            return {self.protect_value(k): self.protect_value(v) for k, v in value.items()}
        return [self.protect_value(v) for v in value] if isinstance(value, list | tuple) else value

    def restore_segments(self, segments: Sequence[TextSegment]) -> list[TextSegment]:
        """The segments, with each placeholder as a plain segment of its own."""
        if not any(OPEN in segment.text or ESCAPED in segment.text for segment in segments):
            return list(segments)
        return [
            TextSegment(self._names[int(part)] if odd else part, segment.response, plain=bool(odd))
            for segment in segments
            for place, part in enumerate(_PLACEHOLDER.split(segment.text))
            if (odd := place % 2) or part
        ]

    def restore_text(self, text: str) -> str:
        """`text` with the names restored, for error messages."""
        return _PLACEHOLDER.sub(lambda found: self._names[int(found[1])], text)
