"""A user's YAML or JSON file as nested values: of `--config`, or a preset in ./config."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel

from training_lens.config.foreign_keys import translate_names
from training_lens.config.ignored_keys import ORIGINS, remove_foreign_keys
from training_lens.config.keys import describe_unknown, known_keys, section_model
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.utils.files import DuplicateKeyError, parse_json
from training_lens.utils.limits import CONFIG_BYTES, CONFIG_NESTING, CONFIG_NODES, NESTING, TooMuchError, read_bytes
from training_lens.utils.names import expand_home
from training_lens.utils.nested import flatten_sections


@dataclass(frozen=True)
class FileContent:
    """The settings of a file, by section, and what to report about it.

    `translated` has a line for each name of another trainer, `ignored` the names that `--from` ignores, `notes` a line
    for each that means less or more here, `problems` a line for each problem.
    """

    file: str
    values: dict[str, Any] = field(default_factory=dict)
    translated: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_config_file(
    file: str, title: str, origin: str | None = None, decided: Mapping[str, Any] | None = None
) -> FileContent:
    """The file's settings, with the flat names of other trainers translated; messages call it by its `title`.

    Args:
        origin: the trainer that the file was written for, see `ignored_keys.ORIGINS`.
        decided: settings from elsewhere, by our dotted key; they replace names without a counterpart.

    Raises:
        ConfigurationError: the file cannot be read, or is no mapping of keys.
    """
    other = ORIGINS[origin].other if origin else ()
    values, translated, problems = translate_names(parse_config_file(file, title), other, f"{title}: ")
    decided = {**flatten_sections(values), **(decided or {})}
    asides = remove_foreign_keys(values, origin, TrainingConfig.model_fields, decided)
    own, foreign = _split_sections(asides.rest)
    own = without_empty_sections(own, TrainingConfig)
    problems = [*problems, *asides.problems, *foreign]
    return FileContent(file, own, translated, asides.ignored, asides.notes, problems)


def _split_sections(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values in our own sections; and a line for each key of unknown sections, with our name for it."""
    foreign = {
        name: section
        for name, section in values.items()
        if isinstance(section, dict) and section and name not in (*TrainingConfig.model_fields, "defaults")
    }
    known = known_keys(TrainingConfig)
    lines = [describe_unknown(key, known, value) for key, value in flatten_sections(foreign).items()]
    return {name: value for name, value in values.items() if name not in foreign}, lines


def parse_config_file(file: str, title: str) -> dict[str, Any]:
    """The file's top-level keys and values; references of a YAML file (`${section.key}`) are resolved."""
    path = expand_home(file)
    try:
        text = read_bytes(path, CONFIG_BYTES).decode("utf-8-sig")
        raw = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        raise ConfigurationError(f"{title}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{title}: is not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{title}, line {error.lineno}: no valid JSON: {error.msg}.") from error
    except DuplicateKeyError as error:
        raise ConfigurationError(f"{title}: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{title}: no valid YAML: {error}") from error
    except (ValueError, RecursionError) as error:  # over a limit, or circular
        raise ConfigurationError(f"{title}: cannot be read ({error}).") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigurationError(f"{title}: holds a {type(raw).__name__}, expected keys and values.")
    return {str(key): value for key, value in raw.items()}


def without_empty_sections(values: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`values` without empty sections: in YAML, `peft:` with all its keys commented out is null."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        inner = section_model(model.model_fields[key]) if key in model.model_fields else None
        if inner and isinstance(value, dict):
            kept[key] = without_empty_sections(value, inner)
        elif not (inner and value is None):
            kept[key] = value
    return kept


_REFERENCE = re.compile(r"\$\{([^${}]*)\}")


class ConfigLoader(yaml.SafeLoader):
    """YAML as people write configs: 1e-4 is a number, a date is text, and no key is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; a key that stands twice is an error."""
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                problem = f"found duplicate key {key.value}"
                raise yaml.constructor.ConstructorError(
                    "while constructing a mapping", node.start_mark, problem, key.start_mark
                )
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, with its references resolved.

    Raises:
        yaml.YAMLError: it is not YAML, or a reference leads nowhere.
        ValueError: it is too deep or too large.
    """
    check_yaml(text)
    values = yaml.load(text, ConfigLoader)  # noqa: S506 (a safe loader)
    if "${" not in text or not isinstance(values, dict):
        return values
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_references(values)
    try:
        return OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        raise yaml.YAMLError(str(error)) from error


def check_yaml(text: str) -> None:
    """Check that a YAML text has bounded depth and size once aliases (`*a`) are followed.

    Raises:
        TooMuchError: it is too deep or too large.
        yaml.YAMLError: it is not YAML.
    """
    named: dict[str, tuple[int, int]] = {}  # by anchor: number of values, and depth
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and number of values before the node
    depths = [0]  # of the open nodes so far
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
    """Check that texts stay of bounded length once their references (`${section.key}`) are followed.

    Raises:
        TooMuchError: they do not.
    """
    leaves = dict(_list_texts(values, ""))
    lengths: dict[str, int] = {}

    def measure_text(key: str, above: frozenset[str]) -> int:
        if key in above or len(above) > NESTING or key not in leaves:
            return len(key)  # OmegaConf reports circles later; anything but a text of the file is short
        if key not in lengths:
            inside = sum(measure_text(name, above | {key}) for name in _REFERENCE.findall(leaves[key]))
            lengths[key] = len(leaves[key]) + inside
        return lengths[key]

    if any(text.count("${") > len(_REFERENCE.findall(text)) for text in leaves.values()):
        raise TooMuchError("has a reference inside of a reference (${a.${b}}); write what is meant")
    if sum(measure_text(key, frozenset()) for key in leaves) > CONFIG_BYTES:
        raise TooMuchError(f"has over {CONFIG_BYTES:,} characters once its references are followed")


def _list_texts(value: Any, key: str) -> Any:
    """Every text, by dotted key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _list_texts(item, f"{key}.{name}" if key else str(name))
    if isinstance(value, str):
        yield key, value
