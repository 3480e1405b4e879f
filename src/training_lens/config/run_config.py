"""A run's own config: read as data, and the code that it names run only where this machine's user allows it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from training_lens import embedded
from training_lens.config.schema import ModelSection, TrainingConfig
from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.utils.consent import code_in, code_of_module, remember, remembered
from training_lens.utils.files import read_json
from training_lens.utils.names import check_experiment, check_run_id, expand_home, require_contained
from training_lens.utils.nested import merged
from training_lens.utils.runs import RunFolder

CodeKey = Literal["model.trust_remote_code", "tracking.custom"]
Settings = Mapping[str, Any]
CODE_KEYS: tuple[CodeKey, ...] = ("model.trust_remote_code", "tracking.custom")
NAMES = {"run_id": check_run_id, "experiment_name": check_experiment}
NOT_OURS = ("tracking/wandb",)  # its client links to logs of its own
WRITTEN_BESIDE = ("adapter_config.json", "mirror.json", "leaderboard.json", "study.db", "best.yaml")


def read_run_config(run: RunFolder, changes: Settings | None = None) -> TrainingConfig:
    """What metadata/config.json says, to be looked at: nothing that it names is run.

    Names that earlier versions took and today's rule refuses are left out of it: the run's folder has them.

    Args:
        changes: settings by section that hold in place of the run's own.

    Raises:
        CheckpointError: it is missing or broken, or a link in the run's folder leads out of it.
        ConfigurationError: it is no config.
    """
    require_contained(run.root, besides=NOT_OURS)
    values = run.read_metadata("config.json")
    if not isinstance(values, dict):
        raise CheckpointError(f"{run.metadata / 'config.json'} holds no config. Restore it, or start a new run.")
    return TrainingConfig.model_validate(merged(_without_old_names(values), changes or {}))


def _without_old_names(values: Settings) -> dict[str, Any]:
    output = values.get("output")
    if not isinstance(output, dict):
        return dict(values)
    return {**values, "output": {key: value for key, value in output.items() if not _is_old_name(key, value)}}


def _is_old_name(key: str, value: Any) -> bool:
    try:
        return key in NAMES and isinstance(value, str) and not NAMES[key](value)
    except ConfigurationError:
        return True


def open_run_config(run: RunFolder, given: Settings, *keys: CodeKey) -> TrainingConfig:
    """What metadata/config.json says, to load or go on with the run, which runs the code that `keys` name.

    Args:
        given: what the user set for this command, by section, such as `{"model": {"trust_remote_code": True}}`.

    Raises:
        CheckpointError, ConfigurationError: see `read_run_config` and `require_consent`.
    """
    config = read_run_config(run)
    require_consent(run.root, config, given, *keys)
    return config


def require_consent(folder: Path, config: TrainingConfig, given: Settings, *keys: CodeKey) -> None:
    """Refuse to run code that the config in `folder` names and the user did not: neither now nor when they trained it.

    Raises:
        ConfigurationError: names the code, and how it is allowed.
    """
    custom = (given.get("tracking") or {}).get("custom") or {}
    allowed = {
        "model.trust_remote_code": (given.get("model") or {}).get("trust_remote_code") is True,
        "tracking.custom": set(config.tracking.custom) <= set(custom),
    }
    asked = [key for key in keys if not allowed[key] and _names_code(config, key)]
    known = remembered(folder) if asked else frozenset()
    others = [key for key in asked if not known or not _code(folder, config, key) <= known]
    problems = [_describe(folder, config, key, bool(known)) for key in others]
    if problems:
        raise ConfigurationError(problems)


def remember_consent(folder: Path, config: TrainingConfig) -> None:
    """Keep that the user allows the code of this config, with which they train, for `folder`."""
    code = [_code(folder, config, key) for key in CODE_KEYS if _names_code(config, key)]
    if code:
        remember(folder, set().union(*code))


def code_settings(config: TrainingConfig) -> dict[str, dict[str, Any]]:
    """The settings that name code, and which model's, by section: to hand on what the user said of one config."""
    model = config.model.model_dump(include={"id", "revision", "trust_remote_code"})
    return {
        **({"model": model} if config.model.trust_remote_code else {}),
        **({"tracking": {"custom": config.tracking.custom}} if config.tracking.custom else {}),
    }


def _names_code(config: TrainingConfig, key: CodeKey) -> bool:
    return config.model.trust_remote_code if key == "model.trust_remote_code" else bool(config.tracking.custom)


def _code(folder: Path, config: TrainingConfig, key: CodeKey) -> set[str]:
    """What would be run, as `utils.consent` keeps it; a model that is not here yet has code that nobody can know."""
    if key == "tracking.custom":
        return {f"{key}: {part}" for place in config.tracking.custom for part in code_of_module(place)}
    model = config.model
    home = _model_folder(model)
    found = {f"{model.id} at {model.revision}", *(code_in(home, model.id) if home else {"not downloaded"})}
    return {f"{key}: {part}" for part in found | code_in(RunFolder(folder).tokenizer, model.id)}


def _model_folder(model: ModelSection) -> Path | None:
    path = expand_home(embedded.resolve(model.id))
    if path.is_dir():
        return path.resolve()
    from huggingface_hub import try_to_load_from_cache

    kept = try_to_load_from_cache(model.id, "config.json", revision=model.revision)
    return Path(kept).parent if isinstance(kept, str) else None


def _describe(folder: Path, config: TrainingConfig, key: CodeKey, is_known: bool) -> str:
    what, value = f"the code of '{config.model.id}'", "true"
    if key == "tracking.custom":
        what = f"your classes {', '.join(config.tracking.custom)}"
        value = json.dumps(config.tracking.custom, ensure_ascii=False)
    why = "it is another one than you allowed for it" if is_known else "a folder's config allows no code by itself"
    return (
        f"{key}: {folder} asks to run {what}, and {why}. Read that code; if you trust it, repeat the command with "
        f"{shlex.quote(f'{key}={value}')}."
    )


def find_writer(file: Path) -> Path | None:
    """The folder of a run, sweep, adapter, mirror or prepared data that a config file is part of; None: of none."""
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
