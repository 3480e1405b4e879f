"""Chats of rows to messages: {role, content} and {from, value}, with tools, calls and loss weights."""

from __future__ import annotations

from typing import Any, get_args

from training_lens.data.types import Message, Role, Row
from training_lens.data.values import encodable, json_of, kind_of
from training_lens.errors import DatasetError
from training_lens.utils.formatting import nearest

ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
EXTRA = ("name", "tool_call_id")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
FUNCTION_CALL = "function_call"  # ShareGPT's role of an assistant that calls a tool; its text is the call in JSON


def chat_of(row: Row, key: str) -> tuple[Message, ...]:
    """The messages of a row with a chat, however they are written.

    Raises:
        DatasetError: no list of messages, a role that is not known, content that is no text; names the message.
    """
    value = row.values.get(key)
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{row.place}: '{key}' is {kind_of(value)}, expected a list of {{role, content}}.")
    messages = [_message(f"{row.place}, '{key}' message {turn}", item) for turn, item in enumerate(value, 1)]
    if messages[0].role in ("assistant", "tool"):
        raise DatasetError(
            f"{row.place}: '{key}' begins with a message of the {messages[0].role}; nothing asks for it. "
            "Begin with a user or system message."
        )
    return tuple(messages)


def _message(place: str, item: Any) -> Message:
    if not isinstance(item, dict) or not ({"role", "content"} <= set(item) or {"from", "value"} <= set(item)):
        found = f"one with {', '.join(map(str, item))}" if isinstance(item, dict) else kind_of(item)
        raise DatasetError(
            f"{place}: expected an object with 'role' and 'content' (or 'from', 'value'), found {found}."
        )
    name = str(item.get("role", item.get("from")))
    role = ROLE_NAMES.get(name)
    if role is None:
        close = nearest(name, ROLE_NAMES)
        hint = f" Did you mean '{close}'?" if close else ""
        raise DatasetError(f"{place}: role '{name}' is none of {', '.join(get_args(Role))}.{hint}")
    _refuse_thoughts_apart(place, item)
    content = item.get("content", item.get("value"))
    calls = _calls(place, name, content, item)
    said = "" if name == FUNCTION_CALL or (calls and content in (None, "")) else _content(place, content)
    extra = {key: item[key] for key in EXTRA if item.get(key)}
    null = content is None and bool(calls)
    return Message(role, said, learn=_learned(place, role, item), calls=calls, extra=extra, null_content=null)


def _refuse_thoughts_apart(place: str, item: dict[str, Any]) -> None:
    apart = next((key for key in THOUGHTS if item.get(key)), None)
    if apart:
        raise DatasetError(
            f"{place}: '{apart}' stands apart from the content and would not be learned. Put it into the content as "
            "<think>...</think> and set data.thinking=true, or take it out."
        )


def _content(place: str, content: Any) -> str:
    """Text, or the text parts of a content list ({"type": "text", "text": ...})."""
    if isinstance(content, list) and content:
        parts = [p.get("text", p.get("value")) if isinstance(p, dict) else p for p in content]
        kinds = [p.get("type", "text") if isinstance(p, dict) else "text" for p in content]
        other = next((k for k in kinds if k != "text"), None)
        if other:
            raise DatasetError(f"{place}: has a part of type '{other}'; only text can be trained on.")
        content = "".join(str(p) for p in parts) if all(isinstance(p, str) for p in parts) else None
    if not isinstance(content, str) or not content:
        raise DatasetError(f"{place}: 'content' is {kind_of(content)}, expected text.")
    return encodable(f"{place}: 'content'", content)


def _learned(place: str, role: Role, item: dict[str, Any]) -> bool:
    """What `loss_weight` (or `weight`) says: 0 or 1; without one every assistant message is learned."""
    weight = item.get("loss_weight", item.get("weight"))
    if weight is None:
        return True
    if weight not in (0, 1):
        raise DatasetError(f"{place}: 'loss_weight' is {weight!r}, expected 0 or 1.")
    if weight and role != "assistant":
        raise DatasetError(f"{place}: 'loss_weight' is 1 on a {role} message; only an assistant's can be learned.")
    return bool(weight)


def _calls(place: str, name: str, content: Any, item: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The functions that a message calls: ShareGPT's function_call text, or OpenAI's `tool_calls`."""
    if name == FUNCTION_CALL:
        call = json_of(place, content, "a function call in JSON")
        return tuple(_call(place, c) for c in (call if isinstance(call, list) else [call]))
    listed = item.get("tool_calls") or []
    if not isinstance(listed, list):
        raise DatasetError(f"{place}: 'tool_calls' is {kind_of(listed)}, expected a list of calls.")
    return tuple(_listed_call(place, call) for call in listed)


def _listed_call(place: str, call: Any) -> dict[str, Any]:
    """One of `tool_calls`: the call with the id beside it, if any."""
    if not isinstance(call, dict):
        return _call(place, call)
    identity = {"id": str(call["id"])} if call.get("id") is not None else {}
    return {**identity, **_call(place, call.get("function", call))}


def _call(place: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise DatasetError(
            f"{place}: a function call is {kind_of(call)}, expected an object with 'name' and 'arguments'."
        )
    arguments = call.get("arguments", {})
    return {
        "name": call["name"],
        "arguments": json_of(place, arguments, "arguments in JSON") if isinstance(arguments, str) else arguments,
    }


def tools_of(row: Row, key: str | None) -> tuple[dict[str, Any], ...]:
    """The tools of a chat, each as OpenAI writes them: {"type": "function", "function": {...}}."""
    value = row.values.get(key) if key else None
    if not value:
        return ()
    tools = json_of(f"{row.place}, '{key}'", value, "a list of tools in JSON") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DatasetError(f"{row.place}: '{key}' is {kind_of(tools)}, expected a list of tool descriptions.")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)
