"""Nested config sections: flattened to dotted keys, merged, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def flatten_sections(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys: `flatten_sections({"peft": {"r": 16}})` is {'peft.r': 16}."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        leaves |= flatten_sections(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return leaves


def merge_sections(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated with `over`. Sections merge; other values, and ranges {low, high}, are replaced."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        sections = isinstance(below, Mapping) and isinstance(value, Mapping) and not {"low", "high"} <= set(value)
        out[key] = merge_sections(below, value) if sections else value  # type: ignore[arg-type]
    return out


def find_differences(sides: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The keys whose values differ between flat mappings, each with its value on every side (None if absent)."""
    keys = dict.fromkeys(key for side in sides for key in side)
    values = {key: tuple(side.get(key) for side in sides) for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each[1:])}


def nest_keys(values: Mapping[str, Any], place: str = "") -> tuple[dict[str, Any], list[str]]:
    """Dotted keys and sections merged to nested sections; and a problem for each key with two different values.

    Args:
        place: prefix of each problem.

    Example:
        >>> nest_keys({"peft": {"r": 16}, "peft.lora_alpha": 32})
        ({'peft': {'r': 16, 'lora_alpha': 32}}, [])
    """
    nested: dict[str, Any] = {}
    before: dict[str, Any] = {}
    problems = []
    for key, value in values.items():
        section = set_at_path({}, key.split("."), value)
        now = flatten_sections(section)
        problems += [
            f"{place}{name} is given twice, {before[name]!r} and {now[name]!r}; keep one"
            for name in now
            if name in before and before[name] != now[name]
        ]
        before |= now
        nested = merge_sections(nested, section)
    return nested, problems


def set_at_path(values: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Set `value` at a path of keys in `values`, in place; values in the way are replaced. Returns `values`."""
    section = values
    for part in path[:-1]:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    section[path[-1]] = value
    return values
