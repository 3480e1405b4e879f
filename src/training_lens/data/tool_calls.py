"""Calls and descriptions of tools: as rows spell them, and as text where a template does not render them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from training_lens.data.chat_template import ChatTemplate
from training_lens.data.examples import Message, Row
from training_lens.data.row_keys import CALL, FUNCTION, KeyCheck
from training_lens.data.turn_templates import TurnTemplate
from training_lens.data.values import describe_value, look_up_value, parse_json
from training_lens.errors import DatasetError
from training_lens.utils.formatting import list_names
from training_lens.utils.limits import load_bounded_json

ToolCall = dict[str, Any]
Tool = Mapping[str, Any]


def read_calls(place: str, item: Mapping[str, Any], keys: KeyCheck, path: str) -> tuple[ToolCall, ...]:
    """The calls of an assistant's message: OpenAI's `tool_calls`, or its older `function_call`.

    Raises:
        DatasetError: both are there, or a call that is none.
    """
    listed, single = item.get("tool_calls"), item.get("function_call")
    if not listed and not single:
        return ()
    if listed and single:
        raise DatasetError(f"{place}: has both 'tool_calls' and 'function_call'. Keep one.")
    if single:
        return (read_call(place, single, keys, f"{path}function_call."),)
    if isinstance(listed, str) and listed.strip():
        listed = parse_json(place, listed, "calls of tools in JSON")
    if listed and not isinstance(listed, list):
        raise DatasetError(f"{place}: 'tool_calls' is {describe_value(listed)}, expected a list of calls.")
    return tuple(read_call(place, call, keys, f"{path}tool_calls[].") for call in listed or ())


def read_written_calls(place: str, text: Any, keys: KeyCheck, path: str) -> tuple[ToolCall, ...]:
    """The calls that a turn of ShareGPT's `function_call` writes as JSON text."""
    value = parse_json(place, text, "a function call in JSON") if isinstance(text, str) or text is None else text
    return tuple(read_call(place, call, keys, path) for call in (value if isinstance(value, list) else [value]))


def read_call(place: str, call: Any, keys: KeyCheck, path: str) -> ToolCall:
    """One call: its name, its arguments, and its id where it has one."""
    if not isinstance(call, Mapping):
        raise _no_call_error(place, call)
    keys.check_keys(f"{place}, a call", CALL, call, path)
    if call.get("type") not in (None, "function"):
        raise DatasetError(f"{place}: calls a tool of type {call['type']!r}; only 'function' can be trained on.")
    function = call
    if call.get("function") is not None:
        function = call["function"]
        if not isinstance(function, Mapping):
            raise _no_call_error(place, function)
        keys.check_keys(f"{place}, a call", FUNCTION, function, f"{path}function.")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise _no_call_error(place, function)
    identity = call.get("id") if call.get("id") is not None else function.get("id")
    named = {} if identity is None else {"id": str(identity)}
    return {**named, "name": function["name"], "arguments": _read_arguments(place, function)}


def _no_call_error(place: str, call: Any) -> DatasetError:
    found = f"one with {', '.join(map(str, call))}" if isinstance(call, Mapping) and call else describe_value(call)
    return DatasetError(f"{place}: a function call is {found}, expected an object with 'name' and 'arguments'.")


def _read_arguments(place: str, function: Mapping[str, Any]) -> Any:
    """The arguments of a call: of two spellings the one that is there; none where a function takes none."""
    found = [function[key] for key in ("arguments", "parameters") if function.get(key) not in (None, "")]
    if len(found) > 1:
        raise DatasetError(f"{place}: a call has both 'arguments' and 'parameters'. Keep one.")
    if not found:
        others = [str(key) for key in function if key not in FUNCTION.names | CALL.names]
        if others:
            raise DatasetError(
                f"{place}: the call of '{function['name']}' has no 'arguments', but {', '.join(others)}. "
                "Name its arguments 'arguments'."
            )
        return {}
    return parse_json(place, found[0], "arguments in JSON") if isinstance(found[0], str) else found[0]


def read_tools(row: Row, key: str | None) -> tuple[Tool, ...]:
    """The tools of a row, each as OpenAI writes them: {"type": "function", "function": {...}}."""
    value = look_up_value(row.values, key) if key else None
    if not value:
        return ()
    place = f"{row.place}, '{key}'"
    tools = parse_json(place, value, "a list of tools in JSON") if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise DatasetError(f"{row.place}: '{key}' is {describe_value(tools)}, expected a list of tools: [{{...}}].")
    return tuple(_read_tool(row, str(key), tool) for tool in tools)


def _read_tool(row: Row, key: str, tool: Any) -> Tool:
    if isinstance(tool, str):
        tool = parse_json(f"{row.place}, '{key}'", tool, "a tool description in JSON")
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        found = f"an object with {list_names(tool) or 'no keys'}" if isinstance(tool, Mapping) else describe_value(tool)
        raise DatasetError(
            f"{row.place}: '{key}' holds {found}, expected descriptions of tools: objects with 'name', 'description' "
            "and 'parameters'."
        )
    return tool if "function" in tool else {"type": "function", "function": tool}


def find_calls(value: Any, tools: Sequence[Tool]) -> list[Mapping[str, Any]] | None:
    """The calls, each of one of the row's tools, that an answer is: an object, a list or JSON text of it; else None."""
    if not tools:
        return None
    if isinstance(value, str):
        if not value.lstrip().startswith(("[", "{")):
            return None
        try:
            value = load_bounded_json(value)
        except ValueError:
            return None
    items = value if isinstance(value, list) else [value]
    names = {tool["function"]["name"] for tool in tools}
    for item in items:
        call = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or call["name"] not in names:
            return None
    return items or None


def fit_tools(
    template: ChatTemplate | TurnTemplate, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[Sequence[Message], Sequence[Tool], list[str]]:
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
        messages = [
            replace(m, text="\n".join(filter(None, [m.text, *map(_dump_json, m.calls_without_ids)])), calls=())
            for m in messages
        ]
        remarks.append(f"{template.name} has no place for calls of tools: they are learned as JSON")
    if has_results and not template.shows_results:
        messages = [replace(m, role="user") if m.role == "tool" else m for m in messages]
        remarks.append(f"{template.name} has no place for what tools give: it comes as user messages")
    if tools and not template.shows_tools:
        described = "\n".join(["You may call these tools:", *(_dump_json(tool["function"]) for tool in tools)])
        if messages[0].role == "system":
            messages = [replace(messages[0], text=f"{messages[0].text}\n\n{described}"), *messages[1:]]
        else:
            messages = [Message("system", described), *messages]
        tools = ()
        remarks.append(f"{template.name} has no place for tools: their descriptions go into the system message")
    return messages, tools, remarks


def _dump_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
