"""Compose presets, the user's files and overrides to one validated config, reporting all problems at once.

Presets are those of the package, and the user's own in ./config/GROUP/NAME.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

from training_lens.config.config_files import FileContent, read_config_file
from training_lens.config.overrides import Override, read_values, split_words
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.logging import get_logger
from training_lens.utils.nested import flatten_sections, merge_sections, set_at_path

logger = get_logger(__name__)
ConfigFiles = str | Path | Sequence[str | Path] | None
Contents = Sequence[FileContent]
PRESETS = "training_lens.config.presets"
USER_FOLDER = Path("config")
ENDINGS = (".yaml", ".yml")
ITSELF = "_self_"  # in a preset's `defaults`, where its own keys come


def compose(
    config_files: ConfigFiles = None,
    overrides: Sequence[str] = (),
    flags: dict[str, Any] | None = None,
    origin: str | None = None,
) -> TrainingConfig:
    """The validated config of presets, then `config_files` in their order, then `overrides`, then `flags`.

    Args:
        config_files: YAML or JSON files with any part of the config; a later one overrides an earlier one.
        overrides: `training.lr=1e-3`, `data.train=[a.json,b.json]`, `+experiment=quick_test`; see `overrides`.
        flags: settings from a command's own options, by section: `{"inference": {"adapter": "none"}}`.
        origin: the trainer that the files were written for, one of `ORIGINS`: its keys that change no result here are
            set aside.

    Raises:
        ConfigurationError: lists every problem: the key, what was given, what is allowed, the nearest known key.
    """
    words, problems = split_words(overrides)
    choices, others = _split_presets(words, problems)
    values, unreadable = read_values(others, logger.info)
    presets, own = load_presets(choices)
    files = [read_config_file(str(file), f"--config {file}", origin, values) for file in _list_files(config_files)]
    typed: dict[str, Any] = {}
    for key, value in values.items():
        set_at_path(typed, key.split("."), value)
    _report_layers(choices, own, files)
    layers = [presets, *(file.values for file in files), typed, flags or {}]
    for layer in layers:
        _flatten_space(layer)
    problems += [*unreadable, *(line for file in (*own, *files) for line in file.problems)]
    config = validate_values(reduce(merge_sections, layers), problems)
    if files:
        _require_user_consent(config, presets, files, [typed, flags or {}])
    return config


def _require_user_consent(
    config: TrainingConfig, presets: dict[str, Any], files: Contents, layers: Sequence[dict[str, Any]]
) -> None:
    """Refuse code and destinations that only a file of a run, a sweep or an adapter names."""
    from training_lens.config.run_config import FILE_KEYS, find_writer, require_consent

    writers = {file.file: find_writer(Path(file.file)) for file in files}
    own = [file.values for file in files if writers[file.file] is None]
    given = reduce(merge_sections, [presets, *own, *layers])
    for writer in {folder for folder in writers.values() if folder is not None}:
        require_consent(writer, config, given, *FILE_KEYS)


def _list_files(config_files: ConfigFiles) -> list[str | Path]:
    if config_files is None:
        return []
    return [config_files] if isinstance(config_files, str | Path) else list(config_files)


def _split_presets(words: Sequence[Override], problems: list[str]) -> tuple[list[tuple[str, str]], list[Override]]:
    """Groups and names of the chosen presets, and the other overrides; two of one group are a problem."""
    groups = packaged_presets()
    chosen = [word for word in words if word.key in groups and not word.raw.lstrip().startswith("{")]
    for group in dict.fromkeys(word.key for word in chosen):
        names = {word.raw: f"+{word.word.lstrip('+')}" for word in chosen if word.key == group}
        if len(names) > 1:
            problems.append(f"{' '.join(names.values())}: two presets of {group} are given; give one")
    return list(dict.fromkeys((word.key, word.raw) for word in chosen)), [w for w in words if w not in chosen]


def _report_layers(choices: Sequence[tuple[str, str]], own: Contents, files: Contents) -> None:
    """Log which files are used, what they override, and which names were translated."""
    for content in own:
        logger.info("preset %s", content.file)
    for content in (*own, *files):
        name = Path(content.file).name
        if content.translated:
            logger.info("%s: %s", name, ", ".join(content.translated))
        if content.ignored:
            logger.info("%s: set aside, as nothing here depends on them: %s", name, ", ".join(content.ignored))
        for note in content.notes:
            logger.warning("%s: %s", name, note)
    for choice in choices if files else ():
        _report_overridden_preset(files, choice)
    for number, content in enumerate(files[1:], 1):
        _report_merged(files[:number], content)


def _report_overridden_preset(files: Contents, choice: tuple[str, str]) -> None:
    """Log the keys that a preset on the command line sets to one value, and a config file to another."""
    base, chosen = (flatten_sections(load_presets(choices)[0]) for choices in ((), (choice,)))
    for content in files:
        given = flatten_sections(content.values).items()
        keys = [key for key, value in given if value != chosen.get(key, value) and chosen[key] != base.get(key)]
        if keys:
            logger.info("--config %s sets %s over %s", content.file, ", ".join(keys), "=".join(choice))


def _report_merged(earlier: Contents, later: FileContent) -> None:
    """Log that a config file overrides earlier ones, and which keys it changes."""
    before = flatten_sections(reduce(merge_sections, [content.values for content in earlier], {}))
    keys = [key for key, value in flatten_sections(later.values).items() if key in before and before[key] != value]
    changed = f"; it changes {', '.join(keys)}" if keys else ""
    logger.info("--config %s goes over %s%s", later.file, ", ".join(content.file for content in earlier), changed)


def validate_values(values: dict[str, Any], problems: Sequence[str] = ()) -> TrainingConfig:
    """`values` as a config.

    Raises:
        ConfigurationError: lists `problems`, then every problem of the values.
    """
    try:
        config = TrainingConfig.model_validate(values)
        if config.sweep.space:
            from training_lens.config.search_space import parse_space

            parse_space(config)
    except ConfigurationError as error:
        problems = [*problems, *error.problems]
    if problems:
        raise ConfigurationError(problems)
    return config


def _flatten_space(layer: dict[str, Any]) -> None:
    """Write the keys of `sweep.space` in full, so that a later layer overrides single keys of it."""
    sweep = layer.get("sweep")
    if isinstance(sweep, dict) and isinstance(sweep.get("space"), dict):
        from training_lens.config.search_space import flatten_keys

        sweep["space"] = flatten_keys(sweep["space"])


def packaged_presets() -> dict[str, list[str]]:
    """Group -> names of its packaged presets."""
    root = resources.files(PRESETS)
    return {
        group.name: sorted(f.name.removesuffix(".yaml") for f in group.iterdir() if f.name.endswith(".yaml"))
        for group in root.iterdir()
        if group.is_dir() and not group.name.startswith("_")
    }


def user_presets(group: str) -> dict[str, Path]:
    """Name -> file of the user's presets of a group, in ./config."""
    folder = USER_FOLDER / group
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.stem: file for file in files if file.suffix in ENDINGS and file.is_file()}


def load_presets(choices: Sequence[tuple[str, str]]) -> tuple[dict[str, Any], list[FileContent]]:
    """The packaged config.yaml with the chosen presets over it; and the user's own preset files.

    Args:
        choices: pairs of a group and a name; the user's own preset takes precedence over a packaged one.

    Raises:
        ConfigurationError: no such preset; lists those there are, and the nearest.
    """
    own: list[FileContent] = []
    base = read_config_file(str(_packaged_file("config")), "config.yaml").values
    return reduce(merge_sections, [_load_preset(group, name, own, ()) for group, name in choices], base), own


def _load_preset(group: str, name: str, own: list[FileContent], within: tuple[str, ...]) -> dict[str, Any]:
    """The values of one preset, over those that its `defaults` name; the user's files are added to `own`."""
    yours = user_presets(group)
    is_own = name in yours and str(yours[name]) not in within  # `default` may build on the packaged `default`
    if not is_own:
        _require_packaged(group, name, list(yours), within)
    file = str(yours[name] if is_own else _packaged_file(f"{group}/{name}"))
    content = read_config_file(file, file)
    if is_own:
        own.append(content)
    entries = content.values.pop("defaults", [])
    entries = entries if isinstance(entries, list) else [entries]
    before = entries.index(ITSELF) if ITSELF in entries else len(entries)
    named = [_load_default(entry, group, own, (*within, file)) for entry in entries if entry != ITSELF]
    return reduce(merge_sections, [*named[:before], content.values, *named[before:]])


def _packaged_file(name: str) -> Path:
    return Path(str(resources.files(PRESETS))) / f"{name}.yaml"


def _load_default(entry: Any, group: str, own: list[FileContent], within: tuple[str, ...]) -> dict[str, Any]:
    """What an entry of `defaults` names: a preset of the same group, or {group: name}."""
    if isinstance(entry, dict) and len(entry) == 1:
        key, name = next(iter(entry.items()))
        group = str(key).removeprefix("override ").strip("/ ")
    else:
        folder, _, name = str(entry).strip("/").rpartition("/")
        group = folder or group
    if group not in packaged_presets():
        raise ConfigurationError(
            f"{within[-1]}: defaults: {entry!r} names no preset; expected a name, or one of "
            f"{', '.join(f'{known}: NAME' for known in sorted(packaged_presets()))}."
        )
    return _load_preset(group, str(name), own, within)


def _require_packaged(group: str, name: str, own: list[str], within: tuple[str, ...]) -> None:
    there = packaged_presets()[group]
    if name in there:
        return
    hint = did_you_mean(name, [*own, *there])
    yours = f", and in {USER_FOLDER / group}: {', '.join(own)}" if own else ""
    if within and name in own:
        raise ConfigurationError(f"{' -> '.join(within)} -> {name}: these presets build on each other in a circle.")
    place = f"{within[-1]}: " if within else ""
    raise ConfigurationError(f"{place}{group}={name}: no such preset; there are: {', '.join(there)}{yours}.{hint}")
