"""The keys of a schema as dotted names, and which of them an unknown name most likely meant."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from training_lens.config.foreign_keys import UNSET, ForeignKey, find_counterpart
from training_lens.config.ignored_keys import find_origins
from training_lens.utils.formatting import nearest_name


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a schema, dotted: ['model.id', 'model.revision', ...] of `TrainingConfig`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += known_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The known key that `key` most likely meant, also where its section was left out, wrong, or another trainer's."""
    *sections, last = key.split(".")
    same = [name for name in known if name.rsplit(".", 1)[-1] == last]
    in_section = [name for name in same if set(sections) & set(name.split(".")[:-1])]
    if in_section or len(same) == 1:
        return (in_section or same)[0]
    counterpart = find_counterpart(key)
    if counterpart and counterpart.key in known:
        return counterpart.key
    if same:
        return same[0]
    whole = nearest_name(key, known)
    if whole:
        return whole
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    close = nearest_name(last, by_last)
    return by_last[close] if close else None


def describe_unknown(key: str, known: Sequence[str], value: Any = None) -> str:
    """Why a key is refused, and what it is called here: with its value, where that is another one here.

    Args:
        known: the keys that there are, dotted.
        value: what was given for it.
    """
    counterpart, origins = find_counterpart(key), find_origins(key)
    if origins and not (counterpart and counterpart.key in known):
        return (
            f"{key}: unknown key, of another trainer; --from {' or '.join(origins)} sets aside what changes no result"
        )
    close = nearest_key(key, known)
    if close is None:
        return f"{key}: unknown key; no key is near it (training-lens validate shows all)"
    converted = _convert_value(counterpart, value) if counterpart and counterpart.key == close else value
    shown = (
        close
        if converted in (value, UNSET)
        else f"{close}={converted if isinstance(converted, str) else json.dumps(converted)}"
    )
    return f"{key}: unknown key; did you mean '{shown}'?"


def _convert_value(counterpart: ForeignKey, value: Any) -> Any:
    try:
        return counterpart.convert(value)
    except ValueError:
        return value
