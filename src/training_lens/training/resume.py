"""What must stay the same when a run is resumed, and what may change: it continues exactly, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from training_lens.config.distributed_section import DistributedSection
from training_lens.config.keys import known_keys
from training_lens.config.schema import TrainingConfig
from training_lens.data.batching import Schedule
from training_lens.data.token_cache import open_cached_split
from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.training.plan import RunPlan, token_cache_folder
from training_lens.utils.launch import launched_count
from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes

logger = get_logger(__name__)
# They change results by rounding at most, so they may differ from start to start and from machine to machine.
FREE_KEYS = (
    *("model.device", "model.accept_changed_base", "training.micro_batch_tokens", "training.logging_steps"),
    *(f"distributed.{name}" for name in DistributedSection.model_fields),
)
LOCATION_KEYS = ("output.base_output_dir", "output.experiment_name")
# A config may leave these open (null or auto); the run then writes its choice into its own config.
AUTO_KEYS = ("model.seq_len", "data.template", "data.date", "training.lr", "training.precision")


def select_changes(run: RunFolder, recorded: TrainingConfig, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those of `settings` that are among `FREE_KEYS`, by section; all others must be those of the run.

    Raises:
        ConfigurationError: lists each key that differs, and says how to start another run from this one.
    """
    given = TrainingConfig.model_validate(settings)
    given_values, recorded_values = _flatten_keys(given.explicit_values()), _flatten_keys(recorded.model_dump())
    different = [
        key
        for key, value in given_values.items()
        if key not in (*FREE_KEYS, *LOCATION_KEYS)
        and value != recorded_values[key]
        and not (key in AUTO_KEYS and value in (None, "auto"))
    ]
    if different:
        lines = (
            f"  - {key}: the run has {recorded_values[key]!r}, you gave {given_values[key]!r}" for key in different
        )
        lengths = " and ".join(key for key in different if key in ("training.epochs", "training.max_steps"))
        schedule = f"{lengths} would change the learning rate of every step, of those that are done, too. "
        raise ConfigurationError(
            "\n".join((f"the run {run.run_id} has other settings:", *lines, schedule if lengths else ""))
            + "A run keeps its own settings: leave these out to resume it, or start a new run with them. "
            "Once it is finished, a new run can continue from its adapter with peft.from_adapter."
        )
    free: dict[str, dict[str, Any]] = {}
    for section, name in (key.split(".") for key in FREE_KEYS if key in given_values):
        free.setdefault(section, {})[name] = given_values[f"{section}.{name}"]
    return free


def _flatten_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by dotted key of the schema; a key whose value is a mapping keeps it whole."""
    found: dict[str, Any] = {}
    for key in known_keys(TrainingConfig):
        *sections, name = key.split(".")
        section = reduce(lambda inner, part: inner.get(part, {}), sections, values)
        if name in section:
            found[key] = section[name]
    return found


def require_unfinished(run: RunFolder) -> None:
    """Refuse to resume a finished run.

    Raises:
        CheckpointError: it is finished; says how to train on from its adapter.
    """
    if run.status == "finished":
        steps = run.read_metadata("summary.json").get("steps")
        raise CheckpointError(
            f"the run {run.run_id} is finished after {steps} steps; there is nothing to resume. It is in {run.root}. "
            "To train on from its adapter, with a learning rate schedule of its own, start a new run: training-lens "
            f"train peft.from_adapter={run.root}, with model.id, data.train and training.* as you want them."
        )


def require_same_tokens(run: RunFolder, plan: RunPlan) -> None:
    """Refuse to resume with other training data than the run began with; another version may have tokenized them.

    Raises:
        CheckpointError: the tokens differ, or there is no record of them.
    """
    recorded = run.read_metadata("data.json")
    if recorded["fingerprint"] == plan.fingerprint:
        return
    fingerprint, _, examples = recorded["fingerprint"].partition(":")
    tokens = plan.splits["train"].dataset.source.content_hash
    is_same = tokens == recorded.get("tokens", {}).get("train")
    if not is_same and (cached := open_cached_split(fingerprint, token_cache_folder(plan.config))):
        is_same = tokens == cached.source.content_hash  # earlier versions recorded no hash, or one of more than tokens
    is_same = is_same and examples == plan.rows.fingerprint
    if (run.metadata / "held_out.json").is_file() and plan.validation is not None:
        is_same = is_same and run.read_metadata("held_out.json") == plan.held_out_ids()
    if not is_same:
        raise CheckpointError(
            f"the training data of {run.run_id} is no longer what it was: a file, the tokenizer or this program "
            "changed since. Put the old ones back to resume, or start a new run."
        )
    logger.info("the run was begun by another version of this program, which made the same tokens")


def read_global_batch(run: RunFolder) -> int:
    """Examples per step of the run. Versions that recorded none took batch_size for each process."""
    recorded = run.read_metadata("data.json").get("global_batch_size")
    if isinstance(recorded, int):
        return recorded
    training = run.read_metadata("config.json")["training"]
    per_process: int = training["batch_size"] * training.get("gradient_accumulation_steps", 1)
    return per_process * launched_count()


def check_schedule(run: RunFolder, schedule: Schedule, processes: Processes) -> None:
    """Require the steps that the run began with; logs another number of processes.

    Raises:
        CheckpointError: a run of an earlier version, which recorded no global batch, had other steps.
    """
    began = run.read_metadata("data.json").get("processes")
    if began is not None and began != processes.count:
        logger.info(
            "begun by %d processes, resumed by %d: a step keeps its %d examples; losses differ by rounding",
            began, processes.count, schedule.global_batch,
        )  # fmt: skip
    steps = [] if began is not None or not run.metrics_file.is_file() else read_metrics(run.metrics_file)
    steps = [line for line in steps if line["step"] and line.get("epoch")]
    if not steps:
        return
    before = round(steps[-1]["step"] / steps[-1]["epoch"])
    if before != schedule.steps_per_epoch:
        raise CheckpointError(
            f"the run {run.run_id} has {before} steps an epoch, on {processes.count} processes it would have "
            f"{schedule.steps_per_epoch}: it began with another number of processes. Resume it with that many."
        )
