"""Saving and restoring checkpoints, and keeping the last and the best one."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from training_lens.errors import CheckpointError
from training_lens.models.adapters import restore_adapter, save_adapter
from training_lens.runs.checkpoint_format import (
    CheckpointMetadata,
    checkpoint_folder,
    list_checkpoints,
    newest_intact_checkpoint,
    write_checkpoint,
)
from training_lens.training.loop.callbacks import StepReport
from training_lens.training.loop.optimizer import optimizer_tensors, restore_optimizer
from training_lens.utils.devices import diverge_rng, restore_rng_state, rng_state
from training_lens.utils.files import TEMPORARY, read_json, sweep_temporaries, write_json
from training_lens.utils.processes import Processes

RandomStates = dict[str, torch.Tensor]
ADAPTER, OPTIMIZER, RNG, STATE = "adapter", "optimizer.safetensors", "rng.safetensors", "state.json"


@dataclass(frozen=True)
class TrainingState:
    """The state of a run after `step` steps. Together with the seed, `step` is also the position in the data.

    Losses are in nats per supervised token; `loss_sum` is summed over all supervised tokens of all steps.
    `micro_batch_tokens`: most tokens in one forward pass, as set before the first step, or reduced since.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    base_validation_loss: float | None = None
    validation_loss: float | None = None
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0
    micro_batch_tokens: int | None = None

    def count_step(self, report: StepReport) -> TrainingState:
        """The state after one more step."""
        return replace(
            self,
            step=report.step,
            tokens=self.tokens + report.tokens,
            supervised_tokens=self.supervised_tokens + report.supervised_tokens,
            loss_sum=self.loss_sum + report.loss * report.supervised_tokens,
            seconds=self.seconds + report.seconds,
        )

    def count_evaluation(self, loss: float) -> TrainingState:
        """The state after a validation at its step."""
        if loss < self.best_loss:
            return replace(self, validation_loss=loss, best_loss=loss, best_step=self.step, evaluations_since_best=0)
        return replace(self, validation_loss=loss, evaluations_since_best=self.evaluations_since_best + 1)


class CheckpointManager:
    """Saves and restores the checkpoints of one run, and deletes outdated ones.

    Args:
        folder: the run's checkpoints folder.
        data_fingerprint: of the training data; checkpoints of other data are refused.
    """

    def __init__(self, folder: Path | str, data_fingerprint: str) -> None:
        self.folder, self._fingerprint = Path(folder), data_fingerprint

    def save(
        self, model: Any, optimizer: torch.optim.Optimizer, scaler: Any, state: TrainingState, random: RandomStates
    ) -> Path:
        """Write a checkpoint atomically, then delete those that are neither last nor best."""
        target = self.write(model, optimizer, scaler, state, random)
        self.delete_outdated(state)
        return target

    def write(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        state: TrainingState,
        random: RandomStates | None = None,
    ) -> Path:
        """Write a checkpoint atomically, where there is none of its step, and delete nothing.

        Args:
            random: of `gather_rng_states`; None: that of this process alone.
        """

        def write_files(folder: Path) -> None:
            save_adapter(model, folder / ADAPTER)
            save_file(optimizer_tensors(optimizer), folder / OPTIMIZER)
            save_file(random or rng_state(), folder / RNG)
            best = None if math.isinf(state.best_loss) else state.best_loss
            write_json(folder / STATE, {**asdict(state), "best_loss": best, "scaler": scaler.state_dict()})

        target = checkpoint_folder(self.folder, state.step)
        if not target.is_dir():
            write_checkpoint(self.folder, state.step, state.validation_loss, self._fingerprint, write_files)
        return target

    def delete_outdated(self, state: TrainingState) -> None:
        """Delete all but the checkpoint of `state` and the best: older ones, and newer ones that are damaged.

        Call it in one process only, while no other process reads a checkpoint.
        """
        keep = {checkpoint_folder(self.folder, step) for step in (state.step, state.best_step)}
        for folder in list_checkpoints(self.folder):
            if folder not in keep:
                doomed = folder.with_name(
                    f"{TEMPORARY}{folder.name}"
                )  # renamed first: never half a checkpoint in the list
                shutil.rmtree(folder.rename(doomed))

    def find_newest_intact(self) -> tuple[Path, CheckpointMetadata] | None:
        """The newest intact checkpoint. Deletes the leftovers of a killed process first."""
        sweep_temporaries(self.folder, older_than_seconds=0)
        return newest_intact_checkpoint(self.folder)

    def restore(self, model: Any, optimizer: torch.optim.Optimizer, scaler: Any, process: int = 0) -> TrainingState:
        """Restore model, optimizer and random state from the newest intact checkpoint; a fresh state if there is none.

        Call `delete_outdated` before the run writes the next one.

        Raises:
            CheckpointError: the checkpoint is of other training data.
        """
        found = self.find_newest_intact()
        if found is None:
            return TrainingState()
        folder, metadata = found
        if metadata.data_fingerprint != self._fingerprint:
            raise CheckpointError(
                f"{folder} was trained on other data: a data file, the template, the tokenizer or this program changed "
                "since. Put the old ones back to resume, or start a new run."
            )
        return load_checkpoint(folder, model, optimizer, scaler, process)

    def best_or_last(self, state: TrainingState) -> Path:
        """The checkpoint with the lowest validation loss, or the last one if nothing was validated."""
        return checkpoint_folder(self.folder, state.best_step or state.step)


def gather_rng_states(processes: Processes) -> RandomStates:
    """The random states of all processes: 'cpu' of the main one, '1/cpu' of the next. All call it together."""
    main, *others = processes.gather(rng_state())
    return main | {f"{i}/{name}": state for i, part in enumerate(others, 1) for name, state in part.items()}


def _restore_rng_of(process: int, states: RandomStates) -> None:
    """A process that the checkpoint does not know gets a state of its own, made from the main process's."""
    own = {name.removeprefix(f"{process}/"): s for name, s in states.items() if name.startswith(f"{process}/")}
    restore_rng_state(own or {name: s for name, s in states.items() if "/" not in name})
    if not own:
        diverge_rng(process)


def load_checkpoint(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, scaler: Any, process: int = 0
) -> TrainingState:
    """Put a checkpoint that was verified into model, optimizer, scaler and random state; returns where it stood."""
    restore_adapter(model, folder / ADAPTER)
    restore_optimizer(optimizer, load_file(folder / OPTIMIZER))
    _restore_rng_of(process, load_file(folder / RNG))
    values = read_json(folder / STATE)
    scaler.load_state_dict(values.pop("scaler"))
    values["best_loss"] = math.inf if values["best_loss"] is None else values["best_loss"]
    return TrainingState(**values)
