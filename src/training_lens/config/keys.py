"""The keys of a schema as dotted names, and which of them an unknown name most likely meant."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from training_lens.config.foreign_keys import BY_NAME, UNSET, ForeignKey, find_counterpart
from training_lens.config.ignored_keys import ORIGINS
from training_lens.utils.formatting import nearest_name


def section_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section; None for a setting."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a schema, dotted: ['model.id', 'model.revision', ...] of `TrainingConfig`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        inner = section_model(field)
        keys += known_keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys


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
