"""A run's own config, read as data.

Code and destinations that it names are used only if this machine's user allows them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from training_lens import embedded
from training_lens.config.schema import DESTINATIONS, ModelSection, TrainingConfig
from training_lens.config.section import expand_path_text
from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.housekeeping import output_folder
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.consent import find_file_code, find_model_code, find_module_code, read_consent, save_consent
from training_lens.utils.files import read_json
from training_lens.utils.names import check_experiment, check_run_id, expand_home, require_contained
from training_lens.utils.nested import flatten_sections, merge_sections, set_at_path

CodeKey = Literal["model.trust_remote_code", "tracking.custom", "evaluation.metrics", "evaluation.task_path"]
Settings = Mapping[str, Any]
MODEL_CODE: CodeKey = "model.trust_remote_code"
CODE_KEYS: tuple[CodeKey, ...] = (MODEL_CODE, "tracking.custom", "evaluation.metrics", "evaluation.task_path")
SYNC_KEYS = ("tracking.custom", *DESTINATIONS)
RESUME_KEYS = (MODEL_CODE, *SYNC_KEYS)  # settings that a run's own config must not decide by itself
BASE = "output.base_output_dir"
FILE_KEYS = (*CODE_KEYS, *DESTINATIONS, BASE, "prepare.output", "sweep.storage")  # nor the config files of others
NAMES = {"run_id": check_run_id, "experiment_name": check_experiment}
NOT_OURS = ("tracking/wandb",)  # its client creates links to its logs
WRITTEN_BESIDE = ("adapter_config.json", "mirror.json", "leaderboard.json", "study.db", "best.yaml")


def read_run_config(run: RunFolder, changes: Settings | None = None) -> TrainingConfig:
    """The config in metadata/config.json, for reading only: no code that it names is run.

    Names of earlier versions that are invalid now are left out; the run's folder has them. `changes`, by section,
    replace settings of the run.

    Raises:
        CheckpointError: it is missing or broken, or a link in the run's folder leads out of it.
        ConfigurationError: it is not a valid config.
    """
    require_contained(run.root, besides=NOT_OURS)
    values = run.read_metadata("config.json")
    if not isinstance(values, dict):
        raise CheckpointError(f"{run.metadata / 'config.json'} holds no config. Restore it, or start a new run.")
    return TrainingConfig.model_validate(merge_sections(_without_old_names(values), changes or {}))


def locate_outputs(run: RunFolder) -> Path:
    """The output.base_output_dir that contains a run's folder; for a folder elsewhere, the default.

    The path in its config is that of the machine that trained it.
    """
    return output_folder(run.root) or Path(TrainingConfig().output.base_output_dir)


def _without_old_names(values: Settings) -> dict[str, Any]:
    """The values as this version reads them: earlier ones left the experts of a mixture frozen, and did not say so."""
    output, peft = values.get("output"), values.get("peft")
    found = dict(values)
    if isinstance(output, dict):
        found["output"] = {key: value for key, value in output.items() if not _is_old_name(key, value)}
    if isinstance(peft, dict):
        found["peft"] = {"target_parameters": "none", **peft}
    return found


def _is_old_name(key: str, value: Any) -> bool:
    try:
        return key in NAMES and isinstance(value, str) and not NAMES[key](value)
    except ConfigurationError:
        return True


def open_run_config(run: RunFolder, given: Settings, *keys: str) -> TrainingConfig:
    """The config in metadata/config.json, for loading or resuming the run, with consent to `keys`.

    Args:
        given: the user's settings for this command, by section, such as `{"model": {"trust_remote_code": True}}`.

    Raises:
        CheckpointError, ConfigurationError: see `read_run_config` and `require_consent`.
    """
    config = read_run_config(run)
    require_consent(run.root, config, given, *keys)
    return config


def require_consent(folder: Path, config: TrainingConfig, given: Settings, *keys: str) -> None:
    """Refuse code and destinations of the config in `folder` that the user set neither now nor in training.

    Args:
        keys: those of `CODE_KEYS` name code that would be run; all others are destinations.

    Raises:
        ConfigurationError: names the code and the destinations, and how to allow them.
    """
    named = [key for key in CODE_KEYS if key in keys and _setting_value(config, key)]
    code = [key for key in named if not _is_allowed(given, config, key)]
    places = destination_settings(config, [key for key in keys if key not in CODE_KEYS])
    asked = {key: value for key, value in places.items() if not _is_given(given, key, value)}
    if asked.get(BASE) and output_folder(folder.resolve()) == Path(asked[BASE]).resolve():  # it is in there already
        del asked[BASE]
    known = read_consent(folder) if code or asked else frozenset()
    others = [key for key in code if not known or not _code_entries(folder, config, key) <= known]
    problems = [_describe_code(folder, config, key, bool(known)) for key in others]
    if elsewhere := {key: value for key, value in asked.items() if _consent_entry(key, value) not in known}:
        problems.append(_describe_places(folder, elsewhere))
    if problems:
        raise ConfigurationError(problems)


def remember_consent(folder: Path, config: TrainingConfig) -> None:
    """Remember for `folder` that the user allows the code and the destinations of this config."""
    code = [_code_entries(folder, config, key) for key in CODE_KEYS if _setting_value(config, key)]
    places = {_consent_entry(key, value) for key, value in _changed_settings(config, DESTINATIONS).items()}
    if code or places:
        save_consent(folder, places.union(*code))


def remember_mirror(folder: Path, place: str) -> None:
    """Remember for `folder` that the user allows the mirror `place`, from which it was fetched."""
    save_consent(folder, {_consent_entry("output.mirror", place)})


def consent_for(run: RunFolder, config: TrainingConfig) -> dict[str, Any]:
    """What the user allows `run` by giving `config` for it, by section: its code, and destinations of both."""
    theirs = destination_settings(read_run_config(run))
    settings: dict[str, Any] = {}
    for key, value in destination_settings(config).items():
        if theirs.get(key) == value:
            set_at_path(settings, key.split("."), value)
    if config.tracking.custom:
        set_at_path(settings, ["tracking", "custom"], config.tracking.custom)
    if config.model.trust_remote_code:
        settings["model"] = config.model.model_dump(include={"id", "revision", "trust_remote_code"})
    return settings


def destination_settings(config: TrainingConfig, keys: Collection[str] = DESTINATIONS) -> dict[str, Any]:
    """The destinations, by dotted key: settings below `keys` that are not the defaults, of services that are on."""
    off = {key for key in DESTINATIONS if key not in config.destinations}
    return _changed_settings(config, [key for key in keys if key not in off])


def _changed_settings(config: TrainingConfig, keys: Collection[str]) -> dict[str, Any]:
    defaults = flatten_sections(TrainingConfig().model_dump())
    below = tuple(f"{key}." for key in keys)
    return {
        key: value
        for key, value in flatten_sections(config.explicit_values()).items()
        if f"{key}.".startswith(below) and value != defaults.get(key)
    }


def _consent_entry(key: str, value: Any) -> str:
    return f"{key}: {json.dumps(value, ensure_ascii=False)}"


def _is_given(given: Settings, key: str, value: Any) -> bool:
    """Whether the user set the key to that very value."""
    section: Any = given
    for part in key.split("."):
        section = section.get(part) if isinstance(section, Mapping) else None
    return section is not None and _as_list(section) == _as_list(value)


def _as_list(value: Any) -> list[Any]:
    """A value as the schema reads it: one path is a list of one, `~` is expanded."""
    values = value if isinstance(value, list) else [value]
    return [expand_path_text(str(item)) if isinstance(item, str | Path) else item for item in values]


def _is_allowed(given: Settings, config: TrainingConfig, key: CodeKey) -> bool:
    """Whether the user's settings allow the code of a key."""
    if key == MODEL_CODE:
        return (given.get("model") or {}).get("trust_remote_code") is True
    if key == "tracking.custom":
        return set(config.tracking.custom) <= set((given.get("tracking") or {}).get("custom") or {})
    return _is_given(given, key, _setting_value(config, key))


def _setting_value(config: TrainingConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _code_entries(folder: Path, config: TrainingConfig, key: CodeKey) -> set[str]:
    """The identities of the code of a key, as `utils.consent` stores them; a missing model has an unknown one."""
    return {f"{key}: {part}" for part in _code_identities(folder, config, key)}


def _code_identities(folder: Path, config: TrainingConfig, key: CodeKey) -> Iterator[str]:
    """The origin of the code of a key, and the sha256 of each of its files."""
    if key == MODEL_CODE:
        model = config.model
        home = _model_folder(model)
        yield f"{model.id} at {model.revision}"
        yield from find_model_code(home, model.id) if home else {"not downloaded"}
        yield from find_model_code(RunFolder(folder).tokenizer, model.id)
    elif key == "evaluation.task_path":
        yield from find_file_code(Path(str(config.evaluation.task_path)))
    else:
        for place in _setting_value(config, key):
            yield from find_file_code(Path(place)) if place.endswith(".py") else find_module_code(place)


def _model_folder(model: ModelSection) -> Path | None:
    path = expand_home(embedded.resolve_name(model.id))
    if path.is_dir():
        return path.resolve()
    from huggingface_hub import try_to_load_from_cache

    kept = try_to_load_from_cache(model.id, "config.json", revision=model.revision)
    return Path(kept).parent if isinstance(kept, str) else None


def _describe_code(folder: Path, config: TrainingConfig, key: CodeKey, is_known: bool) -> str:
    value = _setting_value(config, key)
    what = {
        MODEL_CODE: f"the code of '{config.model.id}'",
        "evaluation.task_path": f"the tasks in '{value}', which may name code",
    }.get(key) or f"your own code: {', '.join(value)}"
    why = "it is another one than you allowed for it" if is_known else "a folder's config allows no code by itself"
    return (
        f"{key}: {folder} asks to run {what}, and {why}. Read that code; if you trust it, repeat the command with "
        f"{_as_word(key, value)}."
    )


def _describe_places(folder: Path, settings: Mapping[str, Any]) -> str:
    words = " ".join(_as_word(key, value) for key, value in settings.items())
    return (
        f"{', '.join(settings)}: {folder} says where to write or to send, and you did not, neither now nor when it was "
        f"trained. If you want it there, repeat the command with {words}."
    )


def _as_word(key: str, value: Any) -> str:
    """The setting as it is typed."""
    return shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}")


def find_writer(file: Path) -> Path | None:
    """The folder of the run, sweep, adapter, mirror or prepared data that a config file is part of, if any."""
    home = expand_home(file).resolve().parent
    for folder in (home, *home.parents):
        if (folder / "metadata" / "config.json").is_file():
            return folder
    if any((home / name).exists() for name in WRITTEN_BESIDE) or _is_prepared(home):
        return home
    return None


def _is_prepared(folder: Path) -> bool:
    try:
        return "made_by" in read_json(folder / "manifest.json")
    except (OSError, ValueError, TypeError):
        return False
