"""What a run that is resumed keeps, and what may be set anew: it goes on as if it had never stopped, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from training_lens.config.keys import known_keys
from training_lens.config.schema import TrainingConfig
from training_lens.data.batching import Schedule
from training_lens.data.token_cache import open_cached
from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.training.plan import RunPlan, token_cache_folder
from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes

logger = get_logger(__name__)
# They change no result but for rounding, so they may differ from start to start and from machine to machine.
FREE_KEYS = (*("model.device", "model.accept_changed_base", "training.micro_batch_tokens", "training.logging_steps"),)
LOCATION_KEYS = ("output.base_output_dir", "output.experiment_name")
# What a config may leave to the run (null or auto), which then writes what it chose into its own config.
AUTO_KEYS = ("model.seq_len", "data.template", "data.date", "training.lr", "training.precision")


def select_changes(run: RunFolder, recorded: TrainingConfig, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of `settings`, by section, those of `FREE_KEYS`; all others must be what the run has.

    Raises:
        ConfigurationError: lists each key in which they differ, and says how another run begins where this one is.
    """
    given = TrainingConfig.model_validate(settings)
    mine, theirs = _flatten_keys(given.explicit_values()), _flatten_keys(recorded.model_dump())
    different = [
        key
        for key, value in mine.items()
        if key not in (*FREE_KEYS, *LOCATION_KEYS)
        and value != theirs[key]
        and not (key in AUTO_KEYS and value in (None, "auto"))
    ]
    if different:
        lines = [f"\n  - {key}: the run has {theirs[key]!r}, you gave {mine[key]!r}" for key in different]
        raise ConfigurationError(
            f"the run {run.run_id} has other settings:{''.join(lines)}\n{_describe_ways_to_resume(different)}"
        )
    free: dict[str, dict[str, Any]] = {}
    for section, name in (key.split(".") for key in FREE_KEYS if key in mine):
        free.setdefault(section, {})[name] = mine[f"{section}.{name}"]
    return free


def _flatten_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all keys of the schema that are there; a mapping that is the value of a key stays whole."""
    found: dict[str, Any] = {}
    for key in known_keys(TrainingConfig):
        *sections, name = key.split(".")
        section = reduce(lambda inner, part: inner.get(part, {}), sections, values)
        if name in section:
            found[key] = section[name]
    return found


def _describe_ways_to_resume(keys: Sequence[str]) -> str:
    lengths = [key for key in keys if key in ("training.epochs", "training.max_steps")]
    schedule = (
        f"{' and '.join(lengths)} would change the learning rate of every step, of those that are done, too. "
        if lengths
        else ""
    )
    return (
        f"{schedule}A run goes on with its own settings: leave these out to resume it, or start a new run with them. "
        "Once it is finished, a new run can go on from its adapter with peft.from_adapter."
    )


def require_unfinished(run: RunFolder) -> None:
    """Refuse to resume what is done.

    Raises:
        CheckpointError: says how training goes on from it.
    """
    if run.status == "finished":
        steps = run.read_metadata("summary.json").get("steps")
        raise CheckpointError(
            f"the run {run.run_id} is finished after {steps} steps; there is nothing to resume. It is in {run.root}. "
            "To train on from its adapter, with a learning rate schedule of its own, start a new run: training-lens "
            f"train peft.from_adapter={run.root}, with model.id, data.train and training.* as you want them."
        )


def require_same_tokens(run: RunFolder, plan: RunPlan) -> None:
    """Refuse to go on with other training data than the run began with; another version may have tokenized it.

    Raises:
        CheckpointError: the tokens differ, or nothing here says what they were.
    """
    recorded = run.read_metadata("data.json")
    if recorded["fingerprint"] == plan.fingerprint:
        return
    if not (_has_tokens(recorded, plan) and _has_same_held_out(run, plan)):
        raise CheckpointError(
            f"the training data of {run.run_id} is no longer what it was: a file, the tokenizer or this program "
            "changed since. Put the old ones back to resume, or start a new run."
        )
    logger.info("the run was begun by another version of this program, which made the same tokens of its rows")


def _has_tokens(recorded: Mapping[str, Any], plan: RunPlan) -> bool:
    """Whether the plan has the recorded training tokens, which an earlier version left in the cache alone."""
    fingerprint, _, examples = recorded["fingerprint"].partition(":")
    tokens = recorded.get("tokens", {}).get("train")
    if tokens is None and (cached := open_cached(fingerprint, token_cache_folder(plan.config))):
        tokens = cached.source.content_hash
    is_same: bool = tokens == plan.splits["train"].dataset.source.content_hash
    return is_same and examples == str(len(plan.train))


def _has_same_held_out(run: RunFolder, plan: RunPlan) -> bool:
    if not (run.metadata / "held_out.json").is_file() or plan.validation is None:
        return True
    held_out: list[str] = run.read_metadata("held_out.json")
    return held_out == plan.held_out_ids()


def read_global_batch(run: RunFolder) -> int | None:
    """Examples in a step as the run began; None where an earlier version did not record it."""
    recorded = run.read_metadata("data.json").get("global_batch_size")
    return recorded if isinstance(recorded, int) else None


def check_schedule(run: RunFolder, schedule: Schedule, processes: Processes) -> None:
    """See to it that the steps are those that the run began with, and say where other processes take them.

    Raises:
        CheckpointError: a run of an earlier version, which recorded no global batch, had other steps.
    """
    began = run.read_metadata("data.json").get("processes")
    if began is not None and began != processes.count:
        logger.info(
            "begun by %d processes, resumed by %d: a step keeps its %d examples; losses differ by rounding, and where "
            "there is dropout by what it draws",
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
