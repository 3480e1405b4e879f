"""Replays of a run without some of its rows: the counterfactual that says what they did.

A replay begins at a state that the run kept, or at its start, and ends at the step of the run's adapter. The rows leave
their steps; the rest of each step is as it was, and its loss is divided by the number of its remaining supervised
tokens. A step without rows makes no update. What dropout drops of the rows that remain is the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training_lens.analysis.explanations.row_evidence import ReplayedRows
from training_lens.analysis.explanations.training_rows import suggest_row
from training_lens.config.run_config import Settings
from training_lens.data.batching import StepPlan
from training_lens.data.token_dataset import TokenDataset
from training_lens.display.progress import Progress
from training_lens.errors import CheckpointError, ConfigurationError, TrainingError
from training_lens.models.adapters import restore_adapter, saved_tensors
from training_lens.runs.checkpoint_format import list_checkpoints, verify_checkpoint
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.checkpoint_manager import TrainingState, load_checkpoint
from training_lens.training.loop.memory_budget import explain_out_of_memory
from training_lens.training.loop.trainer import Trainer
from training_lens.training.plan_runner import PlanRunner, plan_recorded_run, run_steps
from training_lens.utils.devices import restore_rng_state, rng_state
from training_lens.utils.formatting import format_count
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


class RowReplay:
    """The replays of one finished run.

    Args:
        run: with a finished adapter; states in lens/states let a replay begin later than at the start.
        given: the user's consent to code of the run's model, see `open_run_config`.

    Raises:
        CheckpointError, ConfigurationError, AdapterError: the run is not finished, or its rows or base changed since.

    Example:
        replay = RowReplay(find_run("latest", "outputs", "default"))
        rows = replay.find_rows(["data/train.jsonl:17"])
        found = replay.measure(queries, [rows], start=replay.find_start(rows))
        print(found.changes)
    """

    def __init__(self, run: RunFolder, progress: Progress | None = None, given: Settings | None = None) -> None:
        run.require_adapter()
        self.run, self._progress = run, progress or Progress()
        self.plan = plan_recorded_run(run, self._progress, given)
        summary = run.read_metadata("summary.json")
        self.end = int(summary.get("adapter_step") or summary["steps"])
        self._states = {0: None, **self._list_states()}
        self._runner: PlanRunner | None = None

    def _list_states(self) -> dict[int, Path]:
        """The run's intact kept states before the step of its adapter, by step."""
        recorded, found = self.run.read_metadata("data.json")["fingerprint"], {}
        for folder in list_checkpoints(self.run.states):
            try:
                manifest = verify_checkpoint(folder)
            except CheckpointError as error:
                logger.warning("skipping a damaged state: %s", error)
                continue
            if manifest.data_fingerprint == recorded and manifest.step <= self.end:
                found[manifest.step] = folder
        return found

    @property
    def training_rows(self) -> TokenDataset:
        """The run's training rows; a row is named by its position here."""
        return self.plan.train

    @property
    def states(self) -> dict[int, Path]:
        """The kept states by step, ascending; empty for a run that kept none."""
        return {step: folder for step, folder in self._states.items() if folder is not None}

    def read_rates(self) -> dict[int, float]:
        """The learning rate of each step, as the run recorded it."""
        return {line["step"]: line["lr"] for line in read_metrics(self.run.metrics_file) if line.get("kind") == "step"}

    def first_uses(self) -> np.ndarray:
        """The first step that takes each row, (rows,); one more than the last step where none does."""
        first = np.full(len(self.training_rows), self.end + 1)
        for plan in self._iterate_steps(0):
            np.minimum.at(first, plan.examples, plan.number)
        return first

    def _iterate_steps(self, start: int) -> Iterator[StepPlan]:
        """The run's steps after `start`, up to that of its adapter."""
        for plan in self.plan.schedule.iterate_steps(after=start):
            if plan.number > self.end:
                return
            yield plan

    def find_rows(self, ids: Collection[str]) -> np.ndarray:
        """The positions of rows by their ids, 'data/train.jsonl:17', in this order.

        Raises:
            ConfigurationError: the run trained on no such row.
        """
        places = {self.training_rows.example_id(position): position for position in range(len(self.training_rows))}
        if unknown := [row for row in ids if row not in places]:
            raise ConfigurationError(
                f"{unknown[0]} is no training row of {self.run.run_id}. An id is a file as the run recorded it and a "
                f"row number.{suggest_row(unknown[0], list(places))}"
            )
        return np.array([places[row] for row in ids], dtype=np.int64)

    def find_start(self, rows: Collection[int] | np.ndarray) -> int:
        """The step of the last state before any of these rows was first used; 0 is the run's start."""
        first = int(self.first_uses()[np.asarray(rows, dtype=np.int64)].min())
        return max(step for step in self._states if step < first)

    def describe_cost(self, replays: int, start: int = 0) -> str:
        """What so many replays train, in one line; `measure` takes one more than it has sets of rows."""
        steps = self.end - start
        tokens = round(replays * steps * self.plan.schedule.global_batch * float(self.training_rows.lengths.mean()))
        return f"{replays} replays of {steps} of {self.end} steps, about {format_count(tokens)} tokens"

    def measure(
        self, queries: TokenDataset, without: Sequence[Collection[int] | np.ndarray], start: int = 0
    ) -> ReplayedRows:
        """Replay the run once with every row, which must give its adapter bit for bit, and once without each set.

        Args:
            queries: texts whose supervised tokens' log-probability is measured after each replay.
            without: for each replay the positions, in `training_rows`, of the rows that are left out.
            start: the step of a kept state, or 0.

        Cost: as `describe_cost` says, and memory as of the run.

        Raises:
            TrainingError: the replay with every row is not the run's adapter, so that no replay of it can be trusted;
                or a loss was not finite.
        """
        found: list[np.ndarray] = []
        with explain_out_of_memory(self.plan.config), self.open_trainer() as trainer:
            beginning = _Beginning(trainer, self._states[start])
            with self._progress.task("replaying", (len(without) + 1) * (self.end - start)) as advance:
                for rows in ([], *without):
                    beginning.restore(trainer)
                    is_out = np.zeros(len(self.training_rows), dtype=bool)
                    is_out[np.asarray(rows, dtype=np.int64)] = True
                    for _ in run_steps(trainer, self._skip_rows(start, is_out)):
                        advance(1)
                    if not found:
                        self._require_same_adapter(trainer.model, start)
                    found.append(-self._load_runner().measure(trainer.model, queries))
        return ReplayedRows(start, self.end, found[0], np.stack(found)[1:])

    def measure_adapter(self, queries: TokenDataset) -> np.ndarray:
        """The log-probability of each query's supervised tokens in the run's adapter, (queries,), in nats."""
        with self.open_trainer() as trainer:
            restore_adapter(trainer.model, self.run.adapter)
            return -self._load_runner().measure(trainer.model, queries)

    @contextmanager
    def open_trainer(self) -> Iterator[Trainer]:
        """The run's trainer at the run's start; the base is loaded once for all that are opened."""
        with self._load_runner().build_trainer(self.plan) as trainer:
            yield trainer

    def _load_runner(self) -> PlanRunner:
        self._runner = self._runner or PlanRunner(self.plan)
        return self._runner

    def _skip_rows(self, start: int, is_out: np.ndarray) -> Iterator[StepPlan]:
        """The steps without these rows; those without a supervised token are skipped."""
        for plan in self._iterate_steps(start):
            kept = plan.examples[~is_out[plan.examples]]
            if self.training_rows.supervised_counts[kept].sum():
                yield replace(plan, examples=kept)

    def _require_same_adapter(self, model: Any, start: int) -> None:
        """Compare the replayed adapter with that of the run, bit for bit."""
        replayed = {name: tensor.detach().clone() for name, tensor in saved_tensors(model).items()}
        restore_adapter(model, self.run.adapter)
        own = saved_tensors(model)
        if different := [name for name, tensor in own.items() if not torch.equal(replayed[name], tensor)]:
            farthest = max(float((replayed[name] - own[name]).abs().max()) for name in different)
            raise TrainingError(
                f"{self.run.run_id} does not repeat: replayed from step {start} with every row, its adapter differs "
                f"from the run's in {len(different)} of {len(own)} tensors, by up to {farthest:.3g}. So no replay "
                f"without rows can be trusted. It was trained on another device, with another version of a package, or "
                "on several processes. Train it again here, and ask the new run."
            )


class _Beginning:
    """Where replays begin: a trainer's fresh adapter and random state, or a kept state."""

    def __init__(self, trainer: Trainer, folder: Path | None) -> None:
        self._folder, self._rng, self._scaler = folder, rng_state(), trainer.scaler.state_dict()
        self._adapter = [parameter.detach().clone() for parameter in trainer.parameters]

    def restore(self, trainer: Trainer) -> None:
        trainer.optimizer.state.clear()
        budget = trainer.state.micro_batch_tokens
        if self._folder is not None:
            trainer.state = load_checkpoint(self._folder, trainer.model, trainer.optimizer, trainer.scaler)
            return
        with torch.no_grad():
            for parameter, own in zip(trainer.parameters, self._adapter, strict=True):
                parameter.copy_(own)
        trainer.scaler.load_state_dict(self._scaler)
        restore_rng_state(self._rng)
        trainer.state = replace(TrainingState(), micro_batch_tokens=budget)
