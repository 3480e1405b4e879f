"""Jinja chat templates: render a chat as segments, split at the beginnings and ends of its answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from training_lens.data.answer_spans import OTHER_TEMPLATE_ADVICE, AnswerFinder, Rendered, RenderedChat, Tools
from training_lens.data.completeness import contains_text, mark_chat
from training_lens.data.examples import Message, TextSegment
from training_lens.data.jinja import JinjaTemplate, choose_source
from training_lens.data.template_forms import ANSWER, ASKED, NINE, TOOL, find_form
from training_lens.errors import DatasetError
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
# Anything that looks like an end-of-turn mark, whether or not the tokenizer has a token for it.
END_LIKE = re.compile(r"\s*(<\|[^|<>\s]{1,40}\|>|</s>|<[a-z_]*end[a-z_]*>|<eos>|<turn\|>|\[/?[A-Z_]{2,20}\])")
PROBE = (Message("user", ASKED), Message("assistant", ANSWER))


class ChatTemplate:
    """One chat template of a tokenizer, rendered in a sandbox.

    The answer's text and its end token are supervised. Anything that the template puts before the text, such as an
    empty thinking block, belongs to the prompt, in training and at inference. With `thinking`, and in chats with tools
    if the template begins a call differently than a text, the prompt ends with the template's generation prompt, and
    everything after it is the answer. Without `source`, the text is the tokenizer's own; `today` is the date that the
    template sees.

    Raises:
        ConfigurationError: the template renders no content, or fails.
    """

    way_out = "Use a template that shows it (data.template=FILE.jinja, or alpaca)"

    def __init__(
        self,
        tokenizer: Any,
        source: str | None = None,
        *,
        thinking: bool = False,
        today: date | None = None,
        name: str = "the chat template",
    ) -> None:
        self.name, self._thinking = name, thinking
        source = source or choose_source(tokenizer.chat_template, False)
        self._jinja = JinjaTemplate(source, tokenizer.special_tokens_map, today or date.today())
        self._eos = tokenizer.eos_token or ""
        self._shapes: set[tuple[Any, ...]] = set()
        self.form = find_form(lambda messages, tools: self._render_plain(messages, tools)[0])
        probe = self._render_messages(PROBE, ())[0]
        before, behind = probe.split(ANSWER, 1)
        tokens, mark = {str(token) for token in tokenizer.added_tokens_decoder.values()}, END_LIKE.match(behind)
        ends = special_token_names(tokenizer) | ({mark[1]} & tokens if mark else set())
        self._answers = AnswerFinder(self._render_messages, ends, behind, name)
        self.marks_without_token = tuple(sorted(set(END_LIKE.findall(probe)) - tokens - ends))
        self.shows_tools, self.shows_results = self.form.shows_tools, self.form.shows_results
        self.shows_calls = self.form.argument_format is not None
        self._calls_start_elsewhere = self._has_other_call_start()
        asked = self._render_messages(PROBE[:1], (), generation=True)[0]
        if asked != before:
            logger.info(
                "template: answers begin behind %r, the template's own generation prompt ends in %r; training and "
                "infer use the first, serve the adapter likewise", before.split(ASKED)[1], asked.split(ASKED)[1],
            )  # fmt: skip

    def list_remarks(self, messages: Sequence[Message]) -> Iterator[str]:
        """Remarks on marks without a token, and on how these messages are passed to the template."""
        if self.marks_without_token:
            listed = ", ".join(f"'{mark}'" for mark in self.marks_without_token)
            yield (
                f"{self.name} marks turns with {listed}, no token of this tokenizer: read as letters. Answers end with "
                f"'{self._eos}' alone; take the tokenizer that the template belongs to, or another template"
            )
        if self.shows_calls:
            yield from self.form.list_remarks(messages)

    def _has_other_call_start(self) -> bool:
        """Whether a tool call begins differently than a text answer after the same chat."""
        tools = [TOOL] if self.shows_tools else []
        call = Message("assistant", "", calls=({"id": NINE, "name": "f", "arguments": {"a": "b"}},))
        try:
            called, said = (self._render_messages([PROBE[0], answer], tools)[0] for answer in (call, PROBE[1]))
        except DatasetError:
            return False
        return self.shows_calls and not called.startswith(said.split(ANSWER)[0])

    def render_prompt(
        self, messages: Sequence[Message], tools: Tools, learned: Collection[int] = ()
    ) -> list[TextSegment]:
        """The rendered chat up to the next answer, split at earlier answers as in training."""
        self._check_shape(messages, tools)
        free = self._answers_at_generation_prompt(messages, tools)
        chat = self._render_chat([*messages, Message("assistant", ANSWER)], tools)
        last = len(messages)
        spans = self._answers.find_answers(chat, {*learned, last}, certain={last}, from_generation_prompt=free)
        start = spans.pop(last)[0]
        asked = self._render_messages(messages, tools, generation=True)[0] if free else chat.text[:start]
        shared = [(a, b, False) for a, b in spans.values() if asked.startswith(chat.text[:b])]
        return _cut_segments(asked, shared)

    def render_example(self, messages: Sequence[Message], tools: Tools, learned: Collection[int]) -> list[TextSegment]:
        """The rendered chat, split at the beginnings and ends of its answers."""
        self._check_shape(messages, tools)
        chat = self._render_chat(messages, tools)
        free = self._answers_at_generation_prompt(messages, tools)
        spans = self._answers.find_answers(chat, learned, certain=learned, from_generation_prompt=free)
        inside = [
            i for i in learned if not chat.marks or any(a < spans[i][1] and spans[i][0] < b for a, b in chat.marks)
        ]
        if learned and not inside:
            raise DatasetError(f"the generation marks of {self.name} leave out every answer. {OTHER_TEMPLATE_ADVICE}")
        text, last = chat.text, len(messages) - 1
        if last in inside and not self._answers.is_ended(text[slice(*spans[last])]):  # the template adds no end token
            start, end = spans[last]
            text = text[:end] + self._eos
            spans[last] = (start, len(text))
        return _cut_segments(text, [(*spans[i], i in inside) for i in sorted(spans)])

    def _answers_at_generation_prompt(self, messages: Sequence[Message], tools: Tools) -> bool:
        """Whether answers begin right after the generation prompt, so that the model chooses how to begin."""
        has_tools = bool(tools) or any(m.calls for m in messages)
        return self._thinking or (has_tools and self._calls_start_elsewhere)

    def _render_chat(self, messages: Sequence[Message], tools: Tools) -> RenderedChat:
        return RenderedChat(messages, tools, *self._render_messages(messages, tools))

    def _render_messages(self, messages: Sequence[Message], tools: Tools, generation: bool = False) -> Rendered:
        return self._render_plain(self.form.format_messages(messages), self.form.format_tools(tools), generation)

    def _render_plain(self, messages: Sequence[Mapping[str, Any]], tools: Tools, generation: bool = False) -> Rendered:
        try:
            return self._jinja.render_chat(messages, tools, generation)
        except Exception as error:  # a template is foreign code and may fail in any way
            roles = ", ".join(message["role"] for message in messages)
            raise DatasetError(
                f"{self.name} refuses a chat of {roles}: {error}. Change the rows, or use another template "
                "(data.template=alpaca, or a .jinja file)."
            ) from error.with_traceback(None)  # else Jinja's frames keep all callers' variables alive

    def _check_shape(self, messages: Sequence[Message], tools: Tools) -> None:
        """Refuse a template that drops a text, call or tool description; checked once per shape of chat."""
        shape = (*((m.role, bool(m.text), m.null_content, len(m.calls)) for m in messages), len(tools))
        if shape in self._shapes:
            return
        marked, marked_tools, marks = mark_chat(messages, tools, ASKED)
        text = self._render_messages(marked, marked_tools)[0]
        lost = next((what for mark, what in marks.items() if not contains_text(text, mark)), None)
        if lost is not None:
            raise lost_content_error(self.name, lost, self.way_out)
        self._shapes.add(shape)


def lost_content_error(name: str, lost: str, way_out: str) -> DatasetError:
    """The error that a template loses content of a row."""
    kind = f"{name} drops (or changes) part of what a row says"
    return DatasetError(f"{name} drops (or changes) {lost}. {way_out}, or take it out of the rows.", kind=kind)


def _cut_segments(text: str, spans: Sequence[tuple[int, int, bool]]) -> list[TextSegment]:
    """`text` as segments, split at ordered spans (start, end, is_learned)."""
    segments, done = [], 0
    for start, end, learned in spans:
        segments += [TextSegment(text[done:start], False), TextSegment(text[start:end], learned)]
        done = end
    return [segment for segment in (*segments, TextSegment(text[done:], False)) if segment.text]


def special_token_names(tokenizer: Any) -> set[str]:
    """The texts of all special tokens, including those without a role, such as end-of-turn marks."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | {str(token) for token in tokenizer.all_special_tokens}
