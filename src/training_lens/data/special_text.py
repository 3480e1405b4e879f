"""Names of special tokens inside data, which stay text while a template renders them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from training_lens.data.examples import Message, TextSegment

# A name stands as (mark, number, mark) while a template renders: noncharacters of Unicode, which no template knows.
# Where a template writes JSON in ASCII, they stand escaped.
OPEN, CLOSE, ESCAPED = "\ufdd0", "\ufdd1", r"\ufdd0"
_PLACEHOLDER = re.compile(rf"(?:{OPEN}|\\ufdd0)(\d+)(?:{CLOSE}|\\ufdd1)")
# What is written like a special token, of whatever tokenizer.
_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|</s>|<(?:start|end)_of_[a-z]+>")


def find_foreign_marks(texts: Iterable[str], tokens: Collection[str]) -> list[str]:
    """What in the texts is written like a special token and is none of these `tokens`, sorted."""
    return sorted({mark for text in texts if "<" in text for mark in _MARK.findall(text)}.difference(tokens))


class SpecialText:
    """Protects the names of special tokens in texts, and puts them back as plain text.

    Args:
        names: of the special tokens; without any, they are tokens wherever they stand.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = sorted(names, key=len, reverse=True)  # the longest first: one may begin another
        self._found = re.compile("|".join(map(re.escape, self._names))) if names else None

    @property
    def are_tokens(self) -> bool:
        """Whether names in data become the tokens that they name."""
        return self._found is None

    def protect_text(self, text: str) -> str:
        """`text` with the names as placeholders."""
        if self._found is None or not self._found.search(text):
            return text
        return self._found.sub(lambda name: f"{OPEN}{self._names.index(name[0])}{CLOSE}", text)

    def protect_messages(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with the names protected, in what they say and in what they call."""
        return [self._protect_message(m) for m in messages] if self._found else messages

    def _protect_message(self, m: Message) -> Message:
        assert self._found
        if not (m.calls or self._found.search(m.text) or self._found.search(m.input)):
            return m  # nearly every message; a copy of each would take as long as the rest of its rendering
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
        """The segments with each placeholder as plain text of its own."""
        if not any(OPEN in segment.text or ESCAPED in segment.text for segment in segments):
            return list(segments)
        return [
            TextSegment(self._names[int(part)] if odd else part, segment.response, plain=bool(odd))
            for segment in segments
            for place, part in enumerate(_PLACEHOLDER.split(segment.text))
            if (odd := place % 2) or part
        ]

    def restore_text(self, text: str) -> str:
        """`text` with the names in it again, for messages."""
        return _PLACEHOLDER.sub(lambda found: self._names[int(found[1])], text)
