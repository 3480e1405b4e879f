"""What a YAML file grows to, computed from its parts before anything follows its aliases and references."""

from __future__ import annotations

import re
from typing import Any

from training_lens.utils.limits import CONFIG_BYTES, CONFIG_NESTING, CONFIG_NODES, NESTING, TooMuchError

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")


def check_yaml(text: str) -> None:
    """See that a YAML text is of bounded depth and size, also once aliases (`*a`) and references (`${a}`) are followed.

    Raises:
        TooMuchError: it is not.
        yaml.YAMLError: it is no YAML.
    """
    import yaml

    named: dict[str, tuple[int, int]] = {}  # of what an anchor names: how many values it has, and how deep it is
    open_nodes: list[tuple[str | None, int]] = []  # each with its anchor, and the values before it
    depths = [0]  # of the open nodes, as far as they are read
    nodes = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            size, depth = named.get(str(event.anchor), (1, 0))
            nodes, depths[-1] = nodes + size, max(depths[-1], depth)
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            named |= {event.anchor: (1, 0)} if event.anchor else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            nodes += 1
            open_nodes.append((event.anchor, nodes))
            depths.append(0)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            depth = depths.pop() + 1
            depths[-1] = max(depths[-1], depth)
            named |= {anchor: (nodes - before + 1, depth)} if anchor else {}
        if len(open_nodes) + depths[-1] > CONFIG_NESTING:
            raise TooMuchError(f"lists and mappings are nested over {CONFIG_NESTING} deep")
        if nodes > CONFIG_NODES:
            raise TooMuchError(f"has over {CONFIG_NODES:,} values once its aliases are followed")


def check_references(values: Any) -> None:
    """See that texts stay of bounded length once their references (`${section.key}`) are followed.

    Raises:
        TooMuchError: one does not.
    """
    leaves = dict(_list_texts(values, ""))
    lengths: dict[str, int] = {}

    def length(key: str, above: frozenset[str]) -> int:
        if key in above or len(above) > NESTING or key not in leaves:
            return len(key)  # a circle is found when it is followed; what is no text of the file is short
        if key not in lengths:
            inside = sum(length(name, above | {key}) for name in _REFERENCE.findall(leaves[key]))
            lengths[key] = len(leaves[key]) + inside
        return lengths[key]

    if any(text.count("${") > len(_REFERENCE.findall(text)) for text in leaves.values()):
        raise TooMuchError("has a reference inside of a reference (${a.${b}}); write what is meant")
    if sum(length(key, frozenset()) for key in leaves) > CONFIG_BYTES:
        raise TooMuchError(f"has over {CONFIG_BYTES:,} characters once its references are followed")


def _list_texts(value: Any, key: str) -> Any:
    """Every text with a reference or without, by dotted key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _list_texts(item, f"{key}.{name}" if key else str(name))
    if isinstance(value, str):
        yield key, value
