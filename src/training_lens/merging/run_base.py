"""Open the adapter that is to be merged, in float32, on the base that it was trained on."""

from __future__ import annotations

from pathlib import Path

from training_lens import embedded
from training_lens.config.run_config import read_run_config
from training_lens.config.schema import ModelSection, TrainingConfig
from training_lens.errors import AdapterError, ConfigurationError
from training_lens.inference.session import Session, open_run, open_session
from training_lens.models.adapter_files import read_config, require_adapter, require_plain
from training_lens.models.base_record import check_base
from training_lens.models.factory import read_facts, resolve_seq_len
from training_lens.models.location import locate_model
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_lookup import BASE_ALONE, find_adapter_run, uses_own_model
from training_lens.utils.names import expand_home

PARTLY = (
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
)  # these say where the adapter's layers are, not what they compute


def find_run(config: TrainingConfig) -> RunFolder | None:
    """The run that is merged; None where `inference.adapter` is a bare adapter folder.

    Raises:
        ConfigurationError: it is the base alone; CheckpointError: there is no such run.
    """
    name = config.inference.adapter
    if name == BASE_ALONE:
        raise ConfigurationError(
            "inference.adapter: 'none' names no adapter to merge; give a run or an adapter folder."
        )
    if uses_own_model(name):
        return None
    return find_adapter_run(name, config.output.base_output_dir, config.output.named_experiment)


def find_adapter(config: TrainingConfig, run: RunFolder | None) -> tuple[Path, ModelSection]:
    """The adapter's folder, and the base that it is merged into: a run's own, else that of the config."""
    if run is None:
        return expand_home(config.inference.adapter), config.model
    return run.adapter, read_run_config(run).model


def open_in_float32(config: TrainingConfig, run: RunFolder | None, same_base: bool) -> tuple[Session, bool]:
    """The adapter on its base, in float32; and whether the base's weights are known to be those that it trained on.

    Args:
        run: from `find_run`.
        same_base: accept `model.id` as the base of a bare adapter, whatever base that names.

    Raises:
        AdapterError: the base is another one, or the adapter is of a kind that has no plain weights.
    """
    if run is None:
        return _open_bare_adapter(config, find_adapter(config, run)[0], same_base)
    device = config.model.device
    session = open_run(run, None if device == "auto" else device, "fp32", config.explicit_values())
    return session, check_base(run.base_record, session.config.model)


def _open_bare_adapter(config: TrainingConfig, folder: Path, same_base: bool) -> tuple[Session, bool]:
    """Check a bare adapter's base by the record of the run that it lies in, or else by its name."""
    settings = read_config(require_adapter(folder))
    require_plain(settings, folder, "inference.adapter", "be merged", also=PARTLY)
    known = check_base(RunFolder(folder.resolve().parents[1]).base_record, config.model)
    if not known and not same_base:
        _check_base_name(folder, settings.get("base_model_name_or_path"), config.model)
    seq_len = resolve_seq_len(config.model, read_facts(config.model))
    exact = config.replace_keys(model={"dtype": "fp32", "seq_len": seq_len}, training={"precision": "fp32"})
    return open_session(exact), known


def _check_base_name(folder: Path, named: str | None, model: ModelSection) -> None:
    here = locate_model(model)
    if not named or named in (here, model.id) or _same_folder(named, here):
        return
    raise AdapterError(
        f"inference.adapter: {folder} was trained on '{named}', and model.id is '{model.id}'. Give model.id={named}; "
        "or --same-base, where they are one model under two names."
    )


def _same_folder(one: str, other: str) -> bool:
    first, second = Path(embedded.resolve_name(one)), Path(other)
    return first.exists() and second.exists() and first.samefile(second)
