"""Chat templates in Jinja: where in the rendered text each answer stands, found without response markers.

The chat is rendered twice: as it is, and with a placeholder in place of each answer. What stands between the
placeholders' surroundings is the answers, exactly. Calls of tools, which a template writes in its own way, are found
by the template's generation marks, else by rendering the chat up to the call and including it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from training_lens.data.types import Message, Segment
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
ANSWER, ASKED = "\ufdd2", "\ufdd3"  # stand for an answer and a prompt: noncharacters of Unicode, no text
ELSEWHERE = "Use data.template=alpaca, or a .jinja file with {% generation %} marks around what is learned."
_MARKS = re.compile(r"\{%-?\s*generation\b")
Span = tuple[int, int]


class ChatTemplate:
    """The chat template that the tokenizer carries, rendered in a sandbox.

    Supervised are the answer's text and the end token behind it. What a template itself puts before the text (an empty
    block of thoughts, say) belongs to the prompt, in training and at inference. With `thinking` the prompt ends where
    the template's generation prompt does, and everything behind it is the answer: its thoughts, too.

    Raises:
        ConfigurationError: the template shows no content, or cannot be rendered.
    """

    def __init__(self, tokenizer: Any, thinking: bool = False) -> None:
        self._tokenizer, self._thinking = tokenizer, thinking
        self._source = _source_of(tokenizer.chat_template)
        self._marked = bool(_MARKS.search(self._source))
        self.tools = "tools" in self._source and "tool_calls" in self._source
        names = sorted(special_names(tokenizer), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._eos = tokenizer.eos_token or ""
        self._content: Callable[[str], Any] = lambda text: text
        self._shapes: set[tuple[Any, ...]] = set()
        self._probe()

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], learned: Collection[int] = ()
    ) -> list[Segment]:
        """The rendered chat up to where the answer would begin, cut at earlier answers as in training."""
        self._check_shown(messages, tools)
        chat = [*messages, Message("assistant", ANSWER)]
        text, marks = self._render(chat, tools)
        spans = self._spans(text, marks, chat, tools, {*learned, len(messages)}, certain={len(messages)})
        start = spans.pop(len(messages))[0]
        asked = self._render(messages, tools, generation=True)[0] if self._thinking else text[:start]
        shared = [(a, b, False) for a, b in spans.values() if asked.startswith(text[:b])]
        return _cut(asked, shared)

    def example(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], learned: Collection[int]
    ) -> list[Segment]:
        """The rendered chat, cut at the beginnings and ends of its answers."""
        self._check_shown(messages, tools)
        text, marks = self._render(messages, tools)
        spans = self._spans(text, marks, messages, tools, learned, certain=learned)
        inside = [i for i in learned if not marks or any(a < spans[i][1] and spans[i][0] < b for a, b in marks)]
        if learned and not inside:
            raise DatasetError(f"the chat template's generation marks leave out every answer. {ELSEWHERE}")
        last = len(messages) - 1
        if last in inside and not self._ends_in_special(text[slice(*spans[last])]):  # it closes turns with none
            end = spans[last][1]
            text = text[:end] + self._eos
            spans[last] = (spans[last][0], len(text))
        return _cut(text, [(*spans[i], i in inside) for i in sorted(spans)])

    def _ends_in_special(self, text: str) -> bool:
        return any(found.end() == len(text) for found in self._special.finditer(text))

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], generation: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and the stretches inside generation marks (neighbours joined)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                conversations=[[self._plain(m) for m in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._source,
                add_generation_prompt=generation,
                return_assistant_tokens_mask=self._marked,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # the template is a foreign program: it may fail in any way
            roles = ", ".join(m.role for m in messages)
            raise DatasetError(
                f"the chat template refuses a chat of {roles}: {error}. Change the row, or use data.template=alpaca."
            ) from error
        return texts[0], _joined(marks[0]) if self._marked else []

    def _plain(self, message: Message) -> dict[str, Any]:
        """The message as chat templates expect it."""
        text = f"{message.text}\n{message.input}" if message.input else message.text
        plain = {"role": message.role, "content": self._content(text), **message.extra}
        if message.calls:
            plain["tool_calls"] = [_listed_call(call) for call in message.calls]
        return plain

    def _probe(self) -> None:
        """Find out in which form the template takes content, and what it puts between its prompt and an answer.

        Raises:
            ConfigurationError: the template shows no content in any form.
        """
        chat = [Message("user", ASKED), Message("assistant", ANSWER)]
        forms: tuple[Callable[[str], Any], ...] = (lambda text: text, lambda text: [{"type": "text", "text": text}])
        problem = "the texts of a chat do not appear in what it renders"
        for self._content in forms:
            try:
                text = self._render(chat, ())[0]
            except DatasetError as error:
                problem = str(error)
                continue
            if ANSWER in text and ASKED in text:
                break
        else:
            raise ConfigurationError(f"data.template: this chat template cannot be trained with: {problem}.")
        self._end = self._special_run(text, text.index(ANSWER) + 1)
        asked = self._render(chat[:1], (), generation=True)[0]
        before = text[: text.index(ANSWER)]
        if asked != before:
            logger.info(
                "template: answers begin behind %r, the template's own generation prompt ends in %r; training and "
                "infer use the first, serve the adapter likewise", before.split(ASKED)[1], asked.split(ASKED)[1],
            )  # fmt: skip

    def _special_run(self, text: str, start: int) -> str:
        """The special tokens that follow each other from `start` on."""
        end = start
        while found := self._special.match(text, end):
            end = found.end()
        return text[start:end]

    def _check_shown(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a template that drops what somebody says; asked once for chats of the same roles.

        Each text but the assistant's is replaced by one of its own, which must appear.
        """
        shape = (*((m.role, bool(m.calls)) for m in messages), bool(tools))
        if shape in self._shapes:
            return
        own = {i: f"{ASKED}{i}{ASKED}" for i, m in enumerate(messages) if m.role != "assistant"}
        marked = [replace(m, text=own.get(i, m.text), input="") for i, m in enumerate(messages)]
        text = self._render(marked, tools)[0]
        lost = next((i for i, mark in own.items() if mark not in text), None)
        if lost is not None:
            said = messages[lost].text
            raise DatasetError(
                f"the chat template drops (or changes) the {messages[lost].role} message {said[:40]!r}. "
                "Leave it out of the rows, or use data.template=alpaca."
            )
        self._shapes.add(shape)

    def _spans(
        self,
        text: str,
        marks: Sequence[Span],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        wanted: Collection[int],
        certain: Collection[int],
    ) -> dict[int, Span]:
        """Position of an answer -> its place in `text`, with its end token.

        Of those that are `wanted`, and of others where they are found; of the `certain` without fail.
        """
        said = [i for i, m in enumerate(messages) if m.role == "assistant" and not m.calls]
        places = self._answers(text, messages, tools, said)
        for index in set(said) & set(wanted) if not places else ():
            places |= self._answers(text, messages, tools, [index])
        spans = {index: self._with_end(text, *place, marks) for index, place in places.items()}
        for index in wanted:
            if index in spans and not (self._thinking and messages[index].text != ANSWER):
                continue
            try:
                spans[index] = self._written(text, marks, messages, tools, index)
            except DatasetError:
                if index in certain:
                    raise
        return dict(sorted(spans.items()))

    def _answers(
        self, text: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], said: Sequence[int]
    ) -> dict[int, Span]:
        """Position -> the place of its text, of answers that the template shows as they are (or stripped)."""
        hidden = [replace(m, text=ANSWER) if i in said else m for i, m in enumerate(messages)]
        pieces = self._render(hidden, tools)[0].split(ANSWER)
        found: dict[int, Span] = {}
        if len(pieces) == len(said) + 1:
            at = 0
            for index, piece, following in zip(said, pieces, pieces[1:], strict=False):
                start = at + len(piece)
                shown = _shown(messages[index].text, text, start, following)
                if not text.startswith(piece, at) or shown is None:
                    break
                at = start + len(shown)
                found[index] = (start, at)
            else:
                if text[at:] == pieces[-1]:
                    return found
        return {}

    def _with_end(self, text: str, start: int, end: int, marks: Sequence[Span]) -> Span:
        """The answer's span with the end token that the template puts behind it."""
        marked = next((b for a, b in marks if a <= start and end <= b), None)
        if marked is not None:
            return start, end + len(self._special_run(text[:marked], end) or text[end:marked].rstrip())
        if self._end and text.startswith(self._end, end):
            return start, end + len(self._end)
        space = len(text[end:]) - len(text[end:].lstrip(" "))  # '... text </s>'
        following = self._special.match(text, end) or self._special.match(text, end + space)
        return start, following.end() if following else end

    def _written(
        self,
        text: str,
        marks: Sequence[Span],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        index: int,
    ) -> Span:
        """The span of an answer that the template writes in its own words: a call, or thoughts taken apart.

        Raises:
            DatasetError: the chat up to the answer is rendered differently once it goes on, or the answer is changed.
        """
        message = messages[index]
        if not (message.calls or self._thinking):
            apart = "</think>" in message.text
            advice = "It takes the answer's thoughts apart: set data.thinking=true." if apart else ELSEWHERE
            raise DatasetError(f"the chat template changes the assistant's text, so it cannot be found. {advice}")
        before = self._render(messages[:index], tools, generation=True)[0]
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if len(marks) == len(answers) and not self._thinking:
            start, end = marks[answers.index(index)]
            start = max(start, len(before)) if text.startswith(before) else start
            return start, start + len(text[start:end].rstrip())
        until = self._render(messages[: index + 1], tools)[0].rstrip()
        if not (text.startswith(until) and until.startswith(before)):
            raise DatasetError(
                "the chat template renders a chat differently once it goes on, so the place of an answer is not "
                f"certain. {'data.supervise=last may help. ' if index < len(messages) - 1 else ''}{ELSEWHERE}"
            )
        self._check_thoughts(message, until[len(before) :])
        if self._ends_in_special(until):
            return len(before), len(until)
        return self._with_end(text, len(before), len(until), ())

    def _check_thoughts(self, message: Message, shown: str) -> None:
        """Refuse an answer whose thoughts the template leaves out."""
        thoughts = message.text.split("</think>")[0].removeprefix("<think>").strip()
        if "</think>" in message.text and thoughts not in shown:
            raise DatasetError(f"the chat template leaves out the thoughts of the answer {message.text[:40]!r}.")


def _listed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as an entry of OpenAI's `tool_calls`."""
    function = {key: call[key] for key in ("name", "arguments")}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function}


def _source_of(template: str | Mapping[str, str]) -> str:
    """The template's text; of several by name, the default."""
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise ConfigurationError(
            f"data.template: the tokenizer has chat templates named {', '.join(template)}, and none named default. "
            "Give one as a .jinja file."
        )
    return template["default"]


def _cut(text: str, spans: Sequence[tuple[int, int, bool]]) -> list[Segment]:
    """`text` as segments, cut at the spans (start, end, whether it is learned), which are in order."""
    segments, done = [], 0
    for start, end, learned in spans:
        segments += [Segment(text[done:start], False), Segment(text[start:end], learned)]
        done = end
    return [segment for segment in (*segments, Segment(text[done:], False)) if segment.text]


def _shown(answer: str, text: str, start: int, following: str) -> str | None:
    """The answer as it stands in `text` at `start`: as it is, or without white space around it."""
    for form in (answer, answer.strip(), answer.rstrip(), answer.lstrip()):
        if text.startswith(form + following, start):
            return form
    return None


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Stretches that touch as one."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def special_names(tokenizer: Any) -> set[str]:
    """The texts of all special tokens, also of those without a role such as BOS: end-of-turn marks and the like."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | {str(token) for token in tokenizer.all_special_tokens}
