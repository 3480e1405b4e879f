"""Presets by group and name: those of the package, and the user's own in ./config/GROUP/NAME.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

from training_lens.config.config_files import FileContent, read_config_file
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.nested import merge_sections

PRESETS = "training_lens.config.presets"
USER_FOLDER = Path("config")
ENDINGS = (".yaml", ".yml")
ITSELF = "_self_"  # in a preset's `defaults`, where its own keys come


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
