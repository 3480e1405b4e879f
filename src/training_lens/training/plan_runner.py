"""Trains a finished run's plan again, as it was or changed, around one loaded base; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from training_lens.config.run_config import MODEL_CODE, Settings, locate_outputs, open_run_config
from training_lens.data.batching import StepPlan
from training_lens.data.token_dataset import TokenDataset
from training_lens.display.progress import Progress
from training_lens.evaluation.evaluator import EvaluationOptions, evaluate_loss
from training_lens.models.base_record import check_base
from training_lens.models.fast.install import uninstall_kernels
from training_lens.runs.run_folder import RunFolder
from training_lens.training.adapted_base import build_trainer
from training_lens.training.loop.checkpoint_manager import CheckpointManager
from training_lens.training.loop.trainer import Trainer
from training_lens.training.plan import RunPlan, plan_run
from training_lens.training.resume import read_global_batch, require_same_tokens
from training_lens.utils.devices import keep_freed_memory
from training_lens.utils.logging import hide_screen_notes


def plan_recorded_run(run: RunFolder, progress: Progress | None = None, given: Settings | None = None) -> RunPlan:
    """The plan by which a run trained: its rows, its steps, and micro-batches of the size that it used at its end.

    Args:
        given: the user's consent to code of the run's model, see `open_run_config`.

    Raises:
        CheckpointError, ConfigurationError, AdapterError: the run cannot be repeated: its rows or its base changed.
    """
    config = open_run_config(run, given or {}, MODEL_CODE)
    check_base(run.base_record, config.model)
    if tokens := run.read_metadata("summary.json").get("micro_batch_tokens"):
        config = config.replace_keys(training={"micro_batch_tokens": tokens})  # the same ones give the same bits
    config = config.replace_keys(
        output={"base_output_dir": str(locate_outputs(run))}, model={"backend": "transformers"}
    )
    with hide_screen_notes():
        plan = plan_run(config, progress or Progress(), read_global_batch(run))
    require_same_tokens(run, plan)
    return plan


class PlanRunner:
    """Trains plans one after the other around one loaded base: that of `plan`."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._model = plan.load_base()

    def train(
        self,
        plan: RunPlan,
        rows: TokenDataset,
        advance: Callable[[float], None] = lambda _: None,
        steps: int | None = None,
    ) -> np.ndarray:
        """The summed loss of each row, (rows,), after `steps` steps; None: all of the plan's.

        Raises:
            TrainingError: a loss was not finite.
        """
        with self.build_trainer(plan) as trainer:
            for _ in run_steps(trainer, islice(trainer.schedule.iterate_steps(), steps)):
                advance(1)
            return self.measure(trainer.model, rows)

    def replay(self, plan: RunPlan, steps: int) -> list[float]:
        """The training losses of the plan's first steps."""
        with self.build_trainer(plan) as trainer:
            return list(run_steps(trainer, islice(trainer.schedule.iterate_steps(), steps)))

    def measure_base(self, rows: TokenDataset) -> np.ndarray:
        """The base's summed loss of each row, (rows,)."""
        return self.measure(self._model, rows)

    @contextmanager
    def build_trainer(self, plan: RunPlan) -> Iterator[Trainer]:
        """The plan's trainer around the base; afterwards the base is free of adapter and kernels again."""
        trainer = build_trainer(plan, self._model, CheckpointManager(Path("unused"), plan.fingerprint))
        try:
            trainer.set_token_budget()
            yield trainer
        finally:
            uninstall_kernels(trainer.model)
            self._model = trainer.model.unload()

    def measure(self, model: Any, rows: TokenDataset) -> np.ndarray:
        """A model's summed loss of each row, (rows,)."""
        plan = self._plan
        pad_id = plan.tokenizer.eos_token_id
        options = EvaluationOptions(plan.processes, plan.precision, plan.micro_batch_tokens, pad_id)
        nll = evaluate_loss(model, rows, options).row_nll
        assert nll is not None
        return nll


def run_steps(trainer: Trainer, steps: Iterator[StepPlan]) -> Iterator[float]:
    """Train these steps; the loss of each."""
    with keep_freed_memory():
        for step in trainer.dataloader.iterate_steps(steps, lambda: trainer.micro_batch_tokens):
            yield trainer.train_step(step).loss
