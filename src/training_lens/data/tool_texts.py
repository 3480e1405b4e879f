"""Tools as text, for templates that do not render tool descriptions, calls or results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from training_lens.data.examples import Message
from training_lens.errors import DatasetError

Tools = Sequence[Mapping[str, Any]]


class ToolPlaces(Protocol):
    """What a template renders of tools."""

    name: str

    @property
    def shows_tools(self) -> bool: ...

    @property
    def shows_calls(self) -> bool: ...

    @property
    def shows_results(self) -> bool: ...


def fit_tools(
    template: ToolPlaces, messages: Sequence[Message], tools: Tools
) -> tuple[Sequence[Message], Tools, list[str]]:
    """The chat as this template can render it, with remarks on what became text.

    Raises:
        DatasetError: the template renders tools but not their calls, so part of the row would be lost.
    """
    has_calls, has_results = any(m.calls for m in messages), any(m.role == "tool" for m in messages)
    if not (tools or has_calls or has_results):
        return messages, tools, []
    if template.shows_tools and has_calls and not template.shows_calls:
        raise DatasetError(
            f"{template.name} shows tools and leaves out the calls of them. Use a template that shows them "
            "(data.template=FILE.jinja), or write the calls into the content as the model is to write them."
        )
    remarks = []
    if has_calls and not template.shows_calls:
        messages = [_write_calls(m) for m in messages]
        remarks.append(f"{template.name} has no place for calls of tools: they are learned as JSON")
    if has_results and not template.shows_results:
        messages = [replace(m, role="user") if m.role == "tool" else m for m in messages]
        remarks.append(f"{template.name} has no place for what tools give: it comes as user messages")
    if tools and not template.shows_tools:
        messages, tools = _describe_tools(messages, tools), ()
        remarks.append(f"{template.name} has no place for tools: their descriptions go into the system message")
    return messages, tools, remarks


def _write_calls(message: Message) -> Message:
    """The message with its calls as JSON text."""
    calls = message.calls_without_ids
    return replace(message, text="\n".join(part for part in (message.text, *map(_dump_json, calls)) if part), calls=())


def _describe_tools(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """The messages with the tools described in the system message."""
    described = "\n".join(["You may call these tools:", *(_dump_json(tool["function"]) for tool in tools)])
    first, *others = messages
    if first.role == "system":
        return [replace(first, text=f"{first.text}\n\n{described}"), *others]
    return [Message("system", described), first, *others]


def _dump_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
