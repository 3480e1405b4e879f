"""The keys of a schema as dotted names, which of them an unknown name most likely meant, and what is wrong with values.

A problem is a line with the key, what was given and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from training_lens.config.foreign_keys import BY_NAME, UNSET, ForeignKey, find_counterpart
from training_lens.config.ignored_keys import ORIGINS
from training_lens.utils.expected_values import describe_expected
from training_lens.utils.formatting import nearest_name
from training_lens.utils.nested import flatten_sections
from training_lens.utils.secrets import redact_text

Location = tuple[int | str, ...]
UNION_LABELS = ("str", "int", "float", "bool", "constrained-int", "constrained-str")
SHOWN_CHARACTERS = 200  # of a value that is refused


def section_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section; None for a setting."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def list_settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a schema, dotted, with its field: ('model.id', ...), ('model.revision', ...) of `TrainingConfig`."""
    for name, field in model.model_fields.items():
        inner = section_model(field)
        if inner:
            yield from list_settings(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def known_keys(model: type[BaseModel]) -> list[str]:
    """Every key of a schema, dotted: ['model.id', 'model.revision', ...] of `TrainingConfig`."""
    return [key for key, _ in list_settings(model)]


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The known key that `key` most likely meant, also where its section was left out, wrong, or another trainer's."""
    *sections, last = key.split(".")
    inside = {name.rsplit(".", 1)[-1]: name for name in known if sections and name.startswith(key[: -len(last)])}
    if close := _find_typo(last, inside):
        return inside[close]
    same = [name for name in known if name.rsplit(".", 1)[-1] == last]
    in_section = [name for name in same if set(sections) & set(name.split(".")[:-1])]
    if in_section or len(same) == 1:
        return (in_section or same)[0]
    counterpart = find_counterpart(key)
    if counterpart and counterpart.key in known:
        return counterpart.key
    if same or (same := [name for name in known if f".{key}." in f".{name}"]):
        return same[0]
    names = {name: flat.key for name, flat in BY_NAME.items() if flat.key in known}
    names |= {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    close = _find_typo(last, names) or _find_shared_words(last, names)
    return names[close] if close else None


def _find_typo(name: str, known: Iterable[str]) -> str | None:
    """The known name of which `name` is a typo; in up to four letters, only one missing, too many or out of place.

    'text' is not what 'test' was meant for.
    """
    if len(name) > 4:
        return nearest_name(name, known, cutoff=0.75)
    moved = (other for other in known if sorted(other) == sorted(name) or other == name[:-1])
    return nearest_name(name, known, cutoff=0.8) or next(moved, None)


def _find_shared_words(name: str, known: Iterable[str]) -> str | None:
    """The known name that has all words of `name`, or the longest whose words are all in it; 'rank' is in lora_rank."""
    words = {other: set(other.split("_")) for other in known}
    given = set(name.split("_")) - {"or"}
    return next(
        (other for other in words if given < words[other]),
        max((other for other in words if words[other] < given), key=len, default=None),
    )


def describe_unknown(key: str, known: Sequence[str], value: Any = None) -> str:
    """Why a key is refused, and what it is called here: with its value, where that is another one here."""
    counterpart = find_counterpart(key)
    origins = [origin for origin, trainer in ORIGINS.items() if trainer.has_key(key)]
    if origins and not (counterpart and counterpart.key in known):
        return (
            f"{key}: unknown key, of another trainer; --from {' or '.join(origins)} sets aside what changes no result"
        )
    close = nearest_key(key, known)
    if close is None:
        return f"{key}: unknown key; no key is near it (training-lens validate shows all)"
    converted = _convert_value(counterpart, value) if counterpart and counterpart.key == close else value
    if converted not in (value, UNSET):
        close += f"={converted if isinstance(converted, str) else json.dumps(converted)}"
    return f"{key}: unknown key; did you mean '{close}'?"


def _convert_value(counterpart: ForeignKey, value: Any) -> Any:
    try:
        return counterpart.convert(value)
    except ValueError:
        return value


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
    """A line for each problem that pydantic found: `key: given this, expected that`.

    `known` are the keys of the whole schema. `prefix` stands before those that the error names, as in 'training.'.
    """
    lines: dict[str, None] = {}  # in order, each once
    expected: dict[str, list[str]] = {}  # by key: a union reports the same value for every member
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
        elif words := describe_expected(item):
            before = expected.setdefault(key, [])
            lines.pop(_write_expected(key, item, before), None)
            expected[key] = list(dict.fromkeys([*before, words]))
            lines[_write_expected(key, item, expected[key])] = None
        else:
            lines[f"{key}: given {_show_value(item)}. {message}"] = None
    return list(lines)


def _write_expected(key: str, item: Mapping[str, Any], expected: Sequence[str]) -> str:
    return f"{key}: given {_show_value(item)}, expected {' or '.join(expected)}"


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
