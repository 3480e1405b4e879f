"""Find out by probing which message format a chat template takes: it is rendered, never parsed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from training_lens.data.completeness import rank_spelling
from training_lens.data.examples import Message
from training_lens.errors import ConfigurationError, DatasetError

ANSWER, ASKED = "\ufdd2", "\ufdd3"  # placeholders for an answer and a prompt: Unicode noncharacters
Arguments = Literal["object", "text"]
CallIds = Literal["optional", "needed", "nine characters"]
Plain = dict[str, Any]
Render = Callable[[Sequence[Plain], Sequence[Plain]], str]

RESULT = "probe-result"
TOOL_NAME = "probe_tool"
PARAMETERS = {"type": "object", "properties": {"probe_parameter": {"type": "string", "description": "a probe"}}}
TOOL = {"type": "function", "function": {"name": TOOL_NAME, "description": "a probe", "parameters": PARAMETERS}}
CALL_NAME, CALL_KEY = "probe_call", "probe_key"
CALL_VALUE = "probe \"value' of\ntwo lines"  # each way to write it in JSON, Python or markup is another text
# Ids as Mistral's templates want them, and as OpenAI gives them.
NINE, LONG = "call00001", "call_0123456789abcdefghijkl"


@dataclass(frozen=True)
class TemplateForm:
    """What a chat template renders, and in which form it takes it.

    `parts`: content is a list of text parts.
    `shows_tools`, `shows_results`: tool descriptions and tool results are rendered.
    `bare_tools`: tool descriptions come without {"type": "function"} around them.
    `argument_format`: how arguments of calls are passed; None if calls are not rendered.
    `null_stays_null`: null content beside a call is passed as null.
    `empty_becomes_null`: empty content is passed as null as well; the template renders calls only then.
    """

    parts: bool = False
    shows_tools: bool = False
    bare_tools: bool = False
    shows_results: bool = False
    argument_format: Arguments | None = None
    null_stays_null: bool = False
    empty_becomes_null: bool = False
    call_ids: CallIds = "optional"

    def format_messages(self, messages: Sequence[Message]) -> list[Plain]:
        """The messages as the template takes them."""
        numbered = messages if self.call_ids == "optional" else _number_calls(messages, self.call_ids)
        return [
            {
                "role": message.role,
                "content": self._format_content(message),
                **message.extra,
                **({"tool_calls": [self._format_call(call) for call in message.calls]} if message.calls else {}),
            }
            for message in numbered
        ]

    def format_tools(self, tools: Sequence[Mapping[str, Any]]) -> list[Plain]:
        """The descriptions of tools as the template takes them."""
        return [dict(tool["function"] if self.bare_tools else tool) for tool in tools]

    def list_remarks(self, messages: Sequence[Message]) -> Iterator[str]:
        """Remarks on how these messages are passed to the template."""
        callers = [m for m in messages if m.calls]
        if not callers:
            return
        form = "JSON text" if self.argument_format == "text" else "objects"
        yield f"arguments of calls go into the template as {form}"
        empty = [m for m in callers if not m.text]
        if any(m.null_content for m in empty) and not self.null_stays_null:
            yield "null content beside a call goes into the template as empty text, since it cannot take null"
        if any(not m.null_content for m in empty) and self.empty_becomes_null:
            yield "empty content beside a call goes into the template as null, since it shows calls only then"
        ids = [call.get("id") for message in callers for call in message.calls]
        if self.call_ids != "optional" and not all(_is_valid(call_id, self.call_ids) for call_id in ids):
            wanted = "ids of nine characters" if self.call_ids == "nine characters" else "an id for every call"
            yield f"the template wants {wanted}: calls without one have an id from their place, such as {NINE}"

    def _format_content(self, message: Message) -> Any:
        text = f"{message.text}\n{message.input}" if message.input else message.text
        if message.calls and not text:
            is_null = self.null_stays_null if message.null_content else self.empty_becomes_null
            return None if is_null else self.format_text(text)
        return self.format_text(text)

    def format_text(self, text: str) -> Any:
        """A text as the template takes it."""
        return [{"type": "text", "text": text}] if self.parts else text

    def _format_call(self, call: Mapping[str, Any]) -> Plain:
        arguments = call["arguments"]
        if self.argument_format == "text":
            arguments = json.dumps(arguments, ensure_ascii=False)
        named = {"id": call["id"]} if "id" in call else {}
        return {**named, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def find_form(render: Render) -> TemplateForm:
    """Probe which form a template takes.

    Args:
        render: renders messages and tools to text; raises DatasetError if the template fails.

    Raises:
        ConfigurationError: the template renders no content in any form.
    """
    form = _try_content(render)
    for tried in (replace(form, shows_tools=True), replace(form, shows_tools=True, bare_tools=True)):
        chat = tried.format_messages([Message("user", ASKED), Message("assistant", ANSWER)])
        if TOOL_NAME in _render_or_nothing(render, chat, tried.format_tools([TOOL])):
            return _try_calls(render, tried)
    return _try_calls(render, form)


def _try_content(render: Render) -> TemplateForm:
    chat = [Message("user", ASKED), Message("assistant", ANSWER)]
    problem = "the texts of a chat do not appear in what it renders"
    for form in (TemplateForm(), TemplateForm(parts=True)):
        try:
            text = render(form.format_messages(chat), ())
        except DatasetError as error:
            problem = str(error)
            continue
        if ANSWER in text and ASKED in text:
            return form
    raise ConfigurationError(f"data.template: this chat template cannot be trained with: {problem}.")


def _try_calls(render: Render, form: TemplateForm) -> TemplateForm:
    """The form completed for calls and results; forms with results are tried first."""
    for results in (True, False):
        kinds: tuple[Arguments, ...] = ("object", "text")
        forms = [
            replace(form, argument_format=kind, shows_results=results, empty_becomes_null=is_null)
            for is_null in (False, True)
            for kind in kinds
        ]
        found = {tried: _rank_call(render, tried, results) for tried in forms}
        shown = {tried: rank for tried, rank in found.items() if rank is not None}
        if shown:
            best = min(shown, key=lambda tried: shown[tried])
            best = _choose_null_content(render, best, results)
            if _rank_call(render, best, results, LONG) is None:
                return replace(best, call_ids="nine characters")
            return best if _rank_call(render, best, results, None) is not None else replace(best, call_ids="needed")
    said = [Message("user", ASKED), Message("assistant", ANSWER), Message("tool", RESULT), Message("assistant", ANSWER)]
    return replace(form, shows_results=RESULT in _render_or_nothing(render, form.format_messages(said), ()))


def _build_call_probe(results: bool, call_id: str | None = NINE) -> list[Message]:
    named = {"id": call_id} if call_id else {}
    call = {**named, "name": CALL_NAME, "arguments": {CALL_KEY: CALL_VALUE}}
    answers = {"tool_call_id": call_id, "name": CALL_NAME} if call_id else {"name": CALL_NAME}
    chat = [Message("user", ASKED), Message("assistant", "", calls=(call,))]
    return [*chat, Message("tool", RESULT, extra=answers), Message("assistant", ANSWER)] if results else chat


def _rank_call(render: Render, form: TemplateForm, results: bool, call_id: str | None = NINE) -> int | None:
    """How well the template renders a call in this form, as `rank_spelling`; None if part of it is lost."""
    tools = form.format_tools([TOOL] if form.shows_tools else ())
    text = _render_or_nothing(render, form.format_messages(_build_call_probe(results, call_id)), tools)
    needed = (CALL_NAME, CALL_KEY, *((RESULT, ANSWER) if results else ()))
    return rank_spelling(CALL_VALUE, text) if all(name in text for name in needed) else None


def _choose_null_content(render: Render, form: TemplateForm, results: bool) -> TemplateForm:
    """Null stays null unless the template then loses the call or writes 'None'."""
    with_empty, with_null = (replace(form, empty_becomes_null=is_null) for is_null in (False, True))
    empty, null = (
        _render_or_nothing(render, tried.format_messages(_build_call_probe(results)), ())
        for tried in (with_empty, with_null)
    )
    shown = _rank_call(render, with_null, results) is not None
    return replace(form, null_stays_null=shown and null.count("None") <= empty.count("None"))


def _render_or_nothing(render: Render, messages: Sequence[Plain], tools: Sequence[Plain]) -> str:
    try:
        return render(messages, tools)
    except DatasetError:
        return ""


def _number_calls(messages: Sequence[Message], wanted: CallIds) -> list[Message]:
    """Give every call without a valid id a new one, and every result the id of its call.

    Ids follow from the calls' positions ('call00001'), so a chat gets the same ids in training and at inference.
    """
    taken = {call["id"] for m in messages for call in m.calls if _is_valid(call.get("id"), wanted)}
    fresh = (name for number in range(1, 10**5) if (name := f"call{number:05d}") not in taken)
    renamed: dict[Any, str] = {}
    waiting: list[str] = []
    numbered = []
    for message in messages:
        if message.calls:
            waiting = []
            for call in message.calls:
                given = call.get("id")
                renamed[given] = str(given) if _is_valid(given, wanted) else next(fresh)
                waiting.append(renamed[given])
            calls = tuple({**call, "id": call_id} for call, call_id in zip(message.calls, waiting, strict=True))
            message = replace(message, calls=calls)
        elif message.role == "tool":  # it answers the call that it names, else the next open one
            given = message.extra.get("tool_call_id")
            answered = renamed[given] if given is not None and given in renamed else next(iter(waiting), NINE)
            if answered in waiting:
                waiting.remove(answered)
            message = replace(message, extra={**message.extra, "tool_call_id": answered})
        numbered.append(message)
    return numbered


def _is_valid(call_id: Any, wanted: CallIds) -> bool:
    return isinstance(call_id, str) and bool(call_id) and (wanted != "nine characters" or len(call_id) == len(NINE))
