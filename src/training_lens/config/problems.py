"""What is wrong with the values of a section: a line for each problem, with the key and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from training_lens.config.keys import describe_unknown, known_keys
from training_lens.utils.nested import flatten_sections
from training_lens.utils.secrets import redact_text

Location = tuple[int | str, ...]
UNION_LABELS = ("str", "int", "float", "bool", "constrained-int", "constrained-str")
SHOWN_CHARACTERS = 200  # of a value that is refused


def find_problems(model: type[BaseModel], values: Any, error: ValidationError) -> list[str]:
    """Every problem of `values`, of which `error` has the first: checks across keys run where each key is sound.

    So they are run again without the keys that are broken.
    """
    problems = list_problems(error, known_keys(model))
    if isinstance(values, Mapping):
        try:
            sound = _drop_locations(values, [item["loc"] for item in error.errors()])
            model.__pydantic_validator__.validate_python(sound)
        except ValidationError as further:
            problems += [line for line in list_problems(further, known_keys(model)) if line not in problems]
    return problems


def list_problems(error: ValidationError, known: Sequence[str], prefix: str = "") -> list[str]:
    """A line for each problem that pydantic found: `key: what was given; what is allowed`.

    `known` are the keys of the whole schema. `prefix` stands before those that the error names, as in 'training.'.
    """
    lines: dict[str, None] = {}  # in order, each once: a union reports the same value for every member
    for item in error.errors(include_url=False):
        path = [prefix.rstrip("."), *(str(part) for part in item["loc"] if not _is_union_label(part))]
        key = ".".join(part for part in path if part)
        message, kind = item["msg"].removeprefix("Value error, "), item["type"]
        if kind in ("extra_forbidden", "no_such_attribute"):
            lines |= {describe_unknown(name, known, value): None for name, value in _list_leaves(key, item["input"])}
        elif kind == "value_error" and key not in known:  # a check across keys: it names them itself
            lines |= dict.fromkeys(message.split("\n"))
        elif kind == "value_error":
            lines[f"{key}: {message}"] = None
        elif kind == "model_type" and not key:
            lines[f"given {_show_value(item)}, expected sections and keys"] = None
        elif kind == "model_type":
            under = [name for name in known if name.startswith(f"{key}.")]
            lines[f"{key}: given {_show_value(item)}, but it is a section with the keys {', '.join(under)}"] = None
        else:
            lines[f"{key}: given {_show_value(item)}. {message}"] = None
    return list(lines)


def _list_leaves(key: str, value: Any) -> Iterable[tuple[str, Any]]:
    """The keys of an unknown section, or the key itself."""
    return flatten_sections({key: value}).items() if isinstance(value, Mapping) and value else ((key, value),)


def _show_value(item: Mapping[str, Any]) -> str:
    """The given value, shortened and redacted."""
    text = redact_text(repr(item["input"]))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _is_union_label(part: int | str) -> bool:
    """Whether a part of a location names a member of a union, such as 'list[str]', and not a key."""
    return isinstance(part, str) and (part in UNION_LABELS or any(mark in part for mark in "[('"))


def _drop_locations(values: Mapping[str, Any], locations: Sequence[Location]) -> dict[str, Any]:
    """`values` without the keys at the locations; a broken list or union is dropped as a whole."""
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for location in locations:
        section = kept.get(str(location[0])) if location else None
        if isinstance(section, dict) and len(location) > 1:
            section.pop(str(location[1]), None)
        elif location:
            kept.pop(str(location[0]), None)
    return kept
