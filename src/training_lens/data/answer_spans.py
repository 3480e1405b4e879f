"""Find the span of each answer in a rendered chat, without response markers.

The chat is rendered twice: as it is, and with a placeholder for each answer. The text between the placeholders'
surroundings is exactly the answers. A tool call, which each template writes in its own way, is found as the text in
the place of a placeholder; failing that, by generation marks, or by rendering the chat up to and including the call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from training_lens.data.completeness import THOUGHTS_END, extract_thoughts
from training_lens.data.examples import Message
from training_lens.data.jinja import Span
from training_lens.data.template_forms import ANSWER, ASKED
from training_lens.errors import DatasetError

OTHER_TEMPLATE_ADVICE = "Use data.template=alpaca, or a .jinja file with {% generation %} marks around what is learned."
Tools = Sequence[Mapping[str, Any]]
Rendered = tuple[str, list[Span]]  # the text, and its spans inside generation marks
Render = Callable[..., Rendered]


@dataclass(frozen=True)
class RenderedChat:
    """A chat, its rendered text, and the spans inside generation marks."""

    messages: Sequence[Message]
    tools: Tools
    text: str
    marks: Sequence[Span]


class AnswerFinder:
    """Finds the answers in what one chat template renders.

    `render` takes messages and tools, and optionally adds the generation prompt. `ends` are tokens that can end an
    answer; `behind`, the text that this template puts after one, may begin with them.
    """

    def __init__(self, render: Render, ends: Collection[str], behind: str, name: str) -> None:
        self._render, self._name = render, name
        self._ends = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or r"(?!)")
        self._end = self.read_end_tokens(behind, 0)

    def find_answers(
        self, chat: RenderedChat, wanted: Collection[int], certain: Collection[int], from_generation_prompt: bool
    ) -> dict[int, Span]:
        """The index of each `wanted` answer, and of others where that is easy -> its span, end token included.

        Args:
            from_generation_prompt: answers begin after the template's generation prompt, not after the text that the
                template itself puts before an answer.

        Raises:
            DatasetError: the template changes a `certain` answer, or its span is ambiguous.
        """
        text_answers = [i for i, m in enumerate(chat.messages) if m.role == "assistant" and not m.calls]
        places = self._find_text_answers(chat, text_answers)
        for index in set(text_answers) & set(wanted) if not places else ():
            places |= self._find_text_answers(chat, [index])
        spans = {index: self._include_end_token(chat, *place) for index, place in places.items()}
        for index in wanted:
            if index in spans and (not from_generation_prompt or chat.messages[index].text == ANSWER):
                continue
            try:
                spans[index] = self._find_rewritten_answer(chat, index, from_generation_prompt, spans.get(index))
            except DatasetError:
                if index in certain:
                    raise
        return dict(sorted(spans.items()))

    def _find_text_answers(self, chat: RenderedChat, answers: Sequence[int]) -> dict[int, Span]:
        """Map answer index to span, for answers that the template renders verbatim (or stripped)."""
        hidden = [replace(m, text=ANSWER) if i in answers else m for i, m in enumerate(chat.messages)]
        pieces = self._render(hidden, chat.tools)[0].split(ANSWER)
        if len(pieces) != len(answers) + 1:
            return {}
        found: dict[int, Span] = {}
        at = 0
        for index, piece, following in zip(answers, pieces, pieces[1:], strict=False):
            start = at + len(piece)
            answer = chat.messages[index].text
            forms = (answer, answer.strip(), answer.rstrip(), answer.lstrip())
            shown = next((form for form in forms if chat.text.startswith(form + following, start)), None)
            if not chat.text.startswith(piece, at) or shown is None:
                return {}
            at = start + len(shown)
            found[index] = (start, at)
        return found if chat.text[at:] == pieces[-1] else {}

    def _include_end_token(self, chat: RenderedChat, start: int, end: int) -> Span:
        """The answer's span, extended by the end token that the template puts after it."""
        text = chat.text
        marked = next((b for a, b in chat.marks if a <= start and end <= b), None)
        if marked is not None:
            return start, end + len(self.read_end_tokens(text[:marked], end) or text[end:marked].rstrip())
        if self._end and text.startswith(self._end, end):
            return start, end + len(self._end)
        space = len(text[end:]) - len(text[end:].lstrip(" "))  # '... text </s>'
        following = self._ends.match(text, end) or self._ends.match(text, end + space)
        return start, following.end() if following else end

    def read_end_tokens(self, text: str, start: int) -> str:
        """The run of end tokens at `start`."""
        end = start
        while found := self._ends.match(text, end):
            end = found.end()
        return text[start:end]

    def is_ended(self, text: str) -> bool:
        """Whether the text ends in a token that can end an answer."""
        return any(found.end() == len(text) for found in self._ends.finditer(text))

    def _find_rewritten_answer(
        self, chat: RenderedChat, index: int, from_generation_prompt: bool, shown: Span | None
    ) -> Span:
        """The span of an answer that the template rewrites: a tool call, or thoughts split off."""
        message = chat.messages[index]
        if not (message.calls or from_generation_prompt):
            apart = THOUGHTS_END in message.text
            advice = "It takes the answer's thoughts apart: set data.thinking=true." if apart else OTHER_TEMPLATE_ADVICE
            raise DatasetError(f"{self._name} changes the assistant's text, so it cannot be found. {advice}")
        text_start = None
        if not from_generation_prompt:  # where a text answer would begin in place of this call
            before, marked, _ = self._render_with_placeholder(chat.messages, chat.tools, index).partition(ANSWER)
            text_start = len(before) if marked and chat.text.startswith(before) else None
        start = text_start
        if start is None:  # where the template's generation prompt before this answer ends
            before = self._render(chat.messages[:index], chat.tools, generation=True)[0]
            start = len(before) if chat.text.startswith(before) else None
        found = shown or (text_start is not None and self._find_call(chat, index, text_start))
        span = found or self._find_by_generation_marks(chat, index) or self._find_by_prefix(chat, index)
        if start is None or span is None or span[1] <= start:
            helps = "data.supervise=last may help. " if index < len(chat.messages) - 1 else ""
            raise DatasetError(
                f"{self._name} renders a chat differently once it goes on, so the place of an answer is not certain. "
                f"{helps}{OTHER_TEMPLATE_ADVICE}"
            )
        written = chat.text[start : span[1]]
        if THOUGHTS_END in message.text and extract_thoughts(message.text) not in written:
            raise DatasetError(f"{self._name} leaves out the thoughts of the answer {message.text[:40]!r}.")
        return start, span[1]

    def _render_with_placeholder(self, messages: Sequence[Message], tools: Tools, index: int) -> str:
        """The chat with a text placeholder instead of a call; empty if the template refuses it."""
        probe = [replace(m, text=ANSWER, calls=()) if i == index else m for i, m in enumerate(messages)]
        try:
            return self._render(probe, tools)[0]
        except DatasetError:  # results without their call, for example
            return ""

    def _find_call(self, chat: RenderedChat, index: int, start: int) -> Span | None:
        """The span of a call: the text where the template would have put a text answer.

        Later messages are replaced by marks, so that what a template pulls into the answer's turn is not included.
        """
        marked = [replace(m, text=ASKED, input="") if i > index and m.text else m for i, m in enumerate(chat.messages)]
        text = self._render(marked, chat.tools)[0]
        before, found, behind = self._render_with_placeholder(marked, chat.tools, index).partition(ANSWER)
        end = len(text) - len(behind)
        if not found or len(before) != start or start >= end or not text.endswith(behind) or ASKED in text[start:end]:
            return None
        return self._include_end_token(chat, start, end) if chat.text[start:end] == text[start:end] else None

    def _find_by_generation_marks(self, chat: RenderedChat, index: int) -> Span | None:
        """The generation marks around an answer, if every answer has them."""
        answers = [i for i, m in enumerate(chat.messages) if m.role == "assistant"]
        if len(chat.marks) != len(answers):
            return None
        start, end = chat.marks[answers.index(index)]
        return start, start + len(chat.text[start:end].rstrip())

    def _find_by_prefix(self, chat: RenderedChat, index: int) -> Span | None:
        """The span from rendering the chat up to and including this answer, if the whole chat begins with that."""
        until = self._render(chat.messages[: index + 1], chat.tools)[0].rstrip()
        if not chat.text.startswith(until):
            return None
        return (
            (0, len(until)) if self.is_ended(until) else self._include_end_token(replace(chat, marks=()), 0, len(until))
        )
