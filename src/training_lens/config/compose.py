"""From presets, the user's file and overrides to one validated config; every problem at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from training_lens.config.coming_from import translate
from training_lens.config.keys import known_keys, nearest_key
from training_lens.config.schema import TrainingConfig
from training_lens.config.search_space import dotted, parse_space
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import nearest
from training_lens.utils.logging import get_logger
from training_lens.utils.nested import flat, merged

logger = get_logger(__name__)
PRESETS = "training_lens.config.presets"


def compose(
    config_file: str | None = None, overrides: Sequence[str] = (), flags: dict[str, Any] | None = None
) -> TrainingConfig:
    """The validated config of packaged presets, then `config_file`, then `overrides`, then `flags`.

    Args:
        config_file: a YAML or JSON file with any part of the config.
        overrides: Hydra's syntax: `training.lr=1e-3`, `data.train=[a.json,b.json]`, `+experiment=quick_test`.
        flags: what a command's own options stand for, by section: `{"inference": {"adapter": "none"}}`.

    Raises:
        ConfigurationError: lists every problem: the key, what was given, what is allowed, the nearest known key.
    """
    groups, values = _split_overrides(overrides)
    from_file, problems = _read_file(config_file)
    for group in groups if from_file else ():
        _tell_overridden(str(config_file), from_file, group)
    for layer in (from_file, values):
        _put_dotted_space(layer)
    layers = (_presets(groups), from_file, values, flags or {})
    return validate(reduce(merged, layers), problems)


def validate(values: dict[str, Any], problems: Sequence[str] = ()) -> TrainingConfig:
    """`values` as a config, or a ConfigurationError with every problem, behind those that were found before."""
    problems = list(problems)
    try:
        config = TrainingConfig.model_validate(values)
    except ValidationError as error:
        problems += problems_of(error)
        try:  # checks across keys only run where each key is sound: try again without the broken ones
            TrainingConfig.model_validate(_without(values, [item["loc"] for item in error.errors()]))
        except ValidationError as further:
            problems += [line for line in problems_of(further) if line not in problems]
    else:
        problems += _space_problems(config)
    if problems:
        raise ConfigurationError(problems)
    return config


def _space_problems(config: TrainingConfig) -> tuple[str, ...]:
    try:
        parse_space(config)
    except ConfigurationError as error:
        return error.problems
    return ()


def _without(values: dict[str, Any], locations: Sequence[tuple[int | str, ...]]) -> dict[str, Any]:
    """`values` without the keys that the locations name; a broken list or union goes as a whole."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for location in locations:
        section = kept.get(str(location[0])) if location else None
        if isinstance(section, dict) and len(location) > 1:
            section.pop(str(location[1]), None)
        elif location:
            kept.pop(str(location[0]), None)
    return kept


def problems_of(error: ValidationError) -> list[str]:
    """A line for each problem that pydantic found: `key: what was given; what is allowed`."""
    known = known_keys()
    lines: dict[str, None] = {}  # in order, each once: a union reports the same value for every member
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"] if not _is_union_label(part))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            close = nearest_key(key, known)
            hint = f"; did you mean '{close}'?" if close else "; no key is near it (training-lens validate shows all)"
            lines[f"{key}: unknown key{hint}"] = None
        elif item["type"] == "value_error" and key not in known:  # a check across keys: it names them itself
            lines |= dict.fromkeys(message.split("\n"))
        elif item["type"] == "value_error":
            lines[f"{key}: {message}"] = None
        elif item["type"] == "model_type":
            under = [name for name in known if name.startswith(f"{key}.")]
            lines[f"{key}: given {item['input']!r}, but it is a section with the keys {', '.join(under)}"] = None
        else:
            lines[f"{key}: given {item['input']!r}. {message}"] = None
    return list(lines)


def _is_union_label(part: int | str) -> bool:
    return isinstance(part, str) and (part == "constrained-int" or any(mark in part for mark in "[('"))


def _split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Preset choices (`+experiment=x`) as they are, and values as a nested dict."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, groups, values, problems = OverridesParser.create(), [], dict[str, Any](), []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            problems.append(f"'{text}' is no override; write key=value, for example training.lr=1e-3")
            continue
        if override.key_or_group in _preset_groups():
            groups.append(text if text.startswith("+") else f"+{text}")
        elif override.is_sweep_override() or override.is_delete():
            problems.append(f"'{text}': sweeps and deletions have no place here; give one value, lists as [a,b]")
        else:
            _put(values, override.key_or_group.split("."), _plain(override.value()))
    for group in {choice.lstrip("+").partition("=")[0] for choice in groups}:
        chosen = [choice for choice in groups if choice.lstrip("+").startswith(f"{group}=")]
        if len(chosen) > 1:
            problems.append(f"{' '.join(chosen)}: two presets of {group} are given; give one")
    if problems:
        raise ConfigurationError(problems)
    return groups, values


def _plain(value: Any) -> Any:
    """Hydra's quoted strings as plain ones, also inside lists and dicts."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    return value.text if hasattr(value, "text") else value


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        values = inner if isinstance(inner, dict) else values
    values[path[-1]] = value


def _put_dotted_space(layer: dict[str, Any]) -> None:
    """Names each key of `sweep.space` in full, so that the space of a later layer goes over that of an earlier one."""
    sweep = layer.get("sweep")
    if isinstance(sweep, dict) and isinstance(sweep.get("space"), dict):
        sweep["space"] = dotted(sweep["space"])


def _preset_groups() -> dict[str, list[str]]:
    """Group -> names of its packaged presets."""
    root = resources.files(PRESETS)
    return {
        group.name: sorted(f.name.removesuffix(".yaml") for f in group.iterdir() if f.name.endswith(".yaml"))
        for group in root.iterdir()
        if group.is_dir() and not group.name.startswith("_")
    }


def _presets(groups: Sequence[str]) -> dict[str, Any]:
    """The packaged config.yaml with the chosen presets, composed by Hydra."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    for choice in groups:
        group, _, name = choice.lstrip("+").partition("=")
        there = _preset_groups()[group]
        if name not in there:
            close = nearest(name, there)
            hint = f" Did you mean '{close}'?" if close else ""
            raise ConfigurationError(f"{group}={name}: no such preset; there are: {', '.join(there)}.{hint}")
    GlobalHydra.instance().clear()
    with initialize_config_module(config_module=PRESETS, version_base="1.3"):
        composed = OmegaConf.to_container(hydra_compose("config", overrides=list(groups)), resolve=True)
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


def _tell_overridden(config_file: str, from_file: dict[str, Any], group: str) -> None:
    """Log the keys that a preset on the command line sets to one value, and the config file to another."""
    packaged, chosen = flat(_presets(())), flat(_presets([group]))
    keys = [k for k, v in flat(from_file).items() if v != chosen.get(k, v) and chosen[k] != packaged.get(k)]
    if keys:
        logger.info("--config %s sets %s over %s", config_file, ", ".join(keys), group.lstrip("+"))


def _read_file(config_file: str | None) -> tuple[dict[str, Any], list[str]]:
    """A user's YAML or JSON file as a nested dict, other trainers' flat names translated; and what could not be."""
    if config_file is None:
        return {}, []
    nested: dict[str, Any] = {}
    for key, value in _parse_file(config_file).items():
        _put(nested, key.split("."), value)
    translation = translate(nested)
    if translation.lines:
        logger.info("%s: %s", Path(config_file).name, ", ".join(translation.lines))
    for key, value in translation.settings.items():
        _put(translation.rest, key.split("."), value)
    return _without_empty_sections(translation.rest, TrainingConfig), translation.problems


def _parse_file(config_file: str) -> dict[str, Any]:
    """The file's top-level keys and values; interpolations are resolved."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(config_file)
    try:
        text = path.read_text(encoding="utf-8")
        raw = (
            json.loads(text) if path.suffix == ".json" else OmegaConf.to_container(OmegaConf.create(text), resolve=True)
        )
    except OSError as error:
        raise ConfigurationError(f"--config {config_file}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--config {config_file}: is not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"--config {config_file}, line {error.lineno}: no valid JSON: {error.msg}.") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigurationError(f"--config {config_file}: no valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigurationError(f"--config {config_file}: holds a {type(raw).__name__}, expected keys and values.")
    return {str(key): value for key, value in raw.items()}


def _without_empty_sections(values: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`values` without sections that say nothing: in YAML, `peft:` with all its keys commented out is null."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        inner: Any = model.model_fields[key].annotation if key in model.model_fields else None
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        if is_section and isinstance(value, dict):
            kept[key] = _without_empty_sections(value, inner)
        elif not (is_section and value is None):
            kept[key] = value
    return kept
