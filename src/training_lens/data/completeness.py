"""Check that a rendered text contains everything in a row: texts, tool calls and tool descriptions."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import escape

from training_lens.data.examples import Message

THOUGHTS_END = "</think>"


def list_spellings(text: str) -> Iterator[str]:
    """Lossless spellings of a text in a template, best first: verbatim, JSON, markup, Python, JSON within JSON."""
    yield text
    written = json.dumps(text, ensure_ascii=False)[1:-1]
    yield written
    yield json.dumps(text)[1:-1]
    yield str(escape(text))
    yield repr(text)[1:-1]
    yield json.dumps(written, ensure_ascii=False)[1:-1]


def mark_chat(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], bracket: str
) -> tuple[list[Message], list[dict[str, Any]], dict[str, str]]:
    """Replace each text, call and tool of a chat by a unique mark; also returns what each mark stands for.

    Unique marks reveal a dropped text even if another text has the same words. `bracket` encloses each mark.
    """
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        name = f"{bracket}{len(marks)}{bracket}"
        marks[name] = what
        return name

    marked_messages, marked_tools = [], []
    for message in messages:
        text = mark(f"the {message.role} message {message.text[:40]!r}") if message.text else ""
        calls = []
        for call in message.calls:
            said = f"the call of {call['name']}"
            arguments = {mark(f"the arguments of {said}"): mark(f"the values of {said}")}
            calls.append({**call, "name": mark(said), "arguments": arguments})
        marked_messages.append(replace(message, text=text, input="", calls=tuple(calls)))
    for tool in tools:
        name = tool["function"]["name"]
        schema = {"type": "string", "description": mark(f"the descriptions of parameters of the tool {name}")}
        parameters = {"type": "object", "properties": {mark(f"the parameters of the tool {name}"): schema}}
        described = {"name": mark(f"the tool {name}"), "description": mark(f"the description of the tool {name}")}
        marked_tools.append({**tool, "function": {**described, "parameters": parameters}})
    return marked_messages, marked_tools, marks


def rank_spelling(text: str, rendered: str) -> int | None:
    """The index of the first of the `list_spellings` of `text` found in `rendered`; None if there is none."""
    return next((rank for rank, spelling in enumerate(list_spellings(text)) if spelling in rendered), None)


def contains_text(rendered: str, text: str) -> bool:
    """Whether `rendered` contains the text, in any spelling, with or without surrounding white space."""
    return text in rendered or rank_spelling(text.strip(), rendered) is not None


def find_lost(
    rendered: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], learned: Collection[int]
) -> str | None:
    """Describe the first part of a chat missing from the rendered text; None if it is complete.

    Thoughts of answers that are not `learned` may be missing: many templates drop them once the chat continues.
    """
    for index, message in enumerate(messages):
        for text in (message.text, message.input):
            if text not in rendered and not _contains_message(rendered, text, message, index in learned):
                return f"the {message.role} message {text[:40]!r}"
        for what, value in (named for call in message.calls for named in _list_call_texts(call)):
            spelled = (str(value),) if isinstance(value, str) else (str(value), json.dumps(value))
            if not any(contains_text(rendered, text) for text in spelled):
                return what
    for function in (tool["function"] for tool in tools):
        for what, text in _list_schema_texts(function):
            if not contains_text(rendered, text):
                return f"{what} {text[:40]!r} of the tool {function['name']}"
    return None


def omits_thoughts(rendered: str, messages: Sequence[Message]) -> bool:
    """Whether the thoughts of any answer are missing from the rendered text."""
    return any(
        THOUGHTS_END in message.text
        and message.text not in rendered
        and not contains_text(rendered, extract_thoughts(message.text))
        for message in messages
        if message.role == "assistant"
    )


def extract_thoughts(answer: str) -> str:
    """The text before `</think>`, without the tags."""
    return answer.split(THOUGHTS_END)[0].removeprefix("<think>").strip()


def _contains_message(rendered: str, text: str, message: Message, learned: bool) -> bool:
    """Like `contains_text`, but an answer's thoughts may stand apart from the rest: reasoning templates do so."""
    if contains_text(rendered, text):
        return True
    if message.role != "assistant" or THOUGHTS_END not in text:
        return False
    said = text.split(THOUGHTS_END)[-1]
    return contains_text(rendered, said) and not (learned and not contains_text(rendered, extract_thoughts(text)))


def _list_call_texts(call: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each name and value in a call, after its description."""
    yield f"the call of {call['name']}", call["name"]
    for key, value in _iterate_leaves(call["arguments"]):
        yield f"the argument {key[:40]!r} of the call of {call['name']}", key
        yield f"the value {str(value)[:40]!r} of the argument {key[:40]!r} of the call of {call['name']}", value


def _iterate_leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The scalars inside `value`, each with its key; keys of containers come without a value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield name, ""
            yield from _iterate_leaves(inner, name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _iterate_leaves(inner, key)
    else:
        yield key, value


def _list_schema_texts(schema: Any) -> Iterator[tuple[str, str]]:
    if isinstance(schema, list | tuple):
        for inner in schema:
            yield from _list_schema_texts(inner)
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        if key in ("name", "description") and isinstance(value, str):
            yield f"the {key}", value
        elif key == "enum" and isinstance(value, list | tuple):
            yield from (("the allowed value", inner) for inner in value if isinstance(inner, str))
        elif key == "properties" and isinstance(value, Mapping):
            for name, inner in value.items():
                yield "the parameter", name
                yield from _list_schema_texts(inner)
        else:
            yield from _list_schema_texts(value)
