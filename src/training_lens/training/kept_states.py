"""The states of a run that stay in lens/states: adapter, optimizer and random state after evenly spaced steps.

They have the format of checkpoints. Explanations read the gradients of rows there, and replay the run from there.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

from training_lens.config.lens_section import LensSection
from training_lens.core.framework import TrainingLensFramework
from training_lens.errors import CheckpointError
from training_lens.models.adapters import saved_tensors
from training_lens.runs.checkpoint_format import checkpoint_folder, list_checkpoint_steps
from training_lens.training.loop.callbacks import Callback, StepReport
from training_lens.training.loop.checkpoint_manager import CheckpointManager
from training_lens.utils.files import TEMPORARY, sweep_temporaries
from training_lens.utils.formatting import describe_error, format_size
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
MEGABYTE = 1_000_000
COST_NAME = "states"  # in the lens's cost


def choose_state_steps(total_steps: int, count: int) -> tuple[int, ...]:
    """The steps after which a state is kept: the middle step of each of `count` equal parts of the run, ascending.

    So each state stands for the steps around it. A run of fewer steps keeps one after each.
    """
    middles = (math.ceil((2 * part + 1) * total_steps / (2 * count)) for part in range(count))
    return tuple(sorted(set(middles)))


class StateKeeper(Callback):
    """Keeps up to `lens.keep_states` states of a run, in at most `lens.states_megabytes`; changes nothing of training.

    A resumed run drops the states after its checkpoint and writes them again. If one cannot be written, a warning says
    so, no further ones are kept, and training continues.

    Args:
        folder: RUN/lens/states.
        lens: whose cost the time counts for.
        data_fingerprint: of the training data, as in checkpoints.
    """

    def __init__(self, folder: Path, section: LensSection, lens: TrainingLensFramework, data_fingerprint: str) -> None:
        self._folder, self._section, self._lens = folder, section, lens
        self._writer, self._steps = CheckpointManager(folder, data_fingerprint), frozenset[int]()

    def on_train_start(self, trainer: Any) -> None:
        size = estimate_state_bytes(trainer)
        count = min(self._section.keep_states, self._section.states_megabytes * MEGABYTE // size)
        steps = choose_state_steps(trainer.schedule.total_steps, count)
        self._steps = frozenset(steps)
        try:
            drop_states(self._folder, after=trainer.state.step)
        except OSError as error:
            self._end(error)
        if count < self._section.keep_states:
            logger.info(
                "%d of %d states of the run stay for explanations: each is %s, and lens.states_megabytes is %d",
                *(len(steps), self._section.keep_states, format_size(size), self._section.states_megabytes),
            )
        elif steps:
            logger.debug("%d states of the run stay for explanations, each %s", len(steps), format_size(size))

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        if report.step not in self._steps:
            return
        started = time.perf_counter()
        try:
            self._writer.write(trainer.model, trainer.optimizer, trainer.scaler, trainer.state)
        except (CheckpointError, OSError) as error:
            self._end(error)
        self._lens.count_seconds(COST_NAME, time.perf_counter() - started)

    def _end(self, error: Exception) -> None:
        self._steps = frozenset()
        cause = describe_error(error.__cause__ or error)  # the error's own advice is for checkpoints
        logger.warning("no further state of the run is kept for explanations: %s Training continues.", cause)
        logger.debug("while keeping a state", exc_info=error)


def estimate_state_bytes(trainer: Any) -> int:
    """At most what a state takes: the adapter as it is saved, and two moments for each trained number."""
    moments = sum(2 * parameter.nbytes for parameter in trainer.parameters)
    return int(sum(tensor.nbytes for tensor in saved_tensors(trainer.model).values()) + moments)


def drop_states(folder: Path, after: int) -> None:
    """Delete the states of later steps, each whole or not at all, and what a killed process left."""
    if not folder.is_dir():
        return
    sweep_temporaries(folder, older_than_seconds=0)
    for step in list_checkpoint_steps(folder):
        if step > after:
            state = checkpoint_folder(folder, step)
            shutil.rmtree(state.rename(state.with_name(f"{TEMPORARY}{state.name}")))
