"""The training loop: `fit` runs the steps, `train_step` is one optimizer update.

A step's loss is the sum over its supervised tokens divided by their number, over all micro-batches and processes:
how the step is cut never changes the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from training_lens.data.batching import StepPlan, order_by_length
from training_lens.data.examples import Batch
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import EvaluationError, InterruptedRunError, TrainingError
from training_lens.evaluation.evaluator import EvaluationOptions, LossReport, evaluate_loss
from training_lens.models.adapters import base_only, trainable_parameters
from training_lens.models.fast.engine import Engine
from training_lens.models.fast.token_dropout import draw_example_keys
from training_lens.models.quantization import has_8bit_layers
from training_lens.training.loop.callbacks import Callback, StepReport, build_not_finite_error
from training_lens.training.loop.checkpoint_manager import CheckpointManager, TrainingState, gather_rng_states
from training_lens.training.loop.dataloader import DataLoader
from training_lens.training.loop.gradient_sum import GradientSum
from training_lens.training.loop.loop_plan import LoopPlan
from training_lens.training.loop.lr_schedule import lr_at
from training_lens.training.loop.memory_budget import REHEARSED_TOKENS, measure_token_budget
from training_lens.training.loop.optimizer import build_optimizer, clip_gradients, grad_norm
from training_lens.training.loop.signals import SignalListener
from training_lens.utils.devices import (
    autocast,
    counts_memory,
    free_memory,
    keep_freed_memory,
    preserve_rng_state,
    trim_heap,
)
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
NO_GRADIENT = (
    "the loss depends on no parameter that requires a gradient, so nothing can be learned: the adapter is switched "
    "off, or all of it is frozen. Look at what callbacks do to the model."
)


class Trainer:
    """Trains the adapter of `model`.

    Args:
        model: the base with its adapter; only the adapter's parameters require gradients.
        checkpoints: where `fit` saves, and what it resumes from.
    """

    def __init__(
        self, model: Any, plan: LoopPlan, checkpoints: CheckpointManager, callbacks: Sequence[Callback] = ()
    ) -> None:
        self.model, self.dataset, self.validation = model, plan.dataset, plan.validation
        self.validation_sample = plan.validation_sample
        self.engine = Engine(model, plan.precision)
        logger.debug("%s", self.engine.kernels)
        self.schedule, self.settings, self.precision = plan.schedule, plan.settings, plan.precision
        self.processes, self.checkpoints, self.pad_id = plan.processes, checkpoints, plan.pad_id
        self.dataloader = DataLoader(plan.dataset, plan.processes, plan.pad_id, self.engine.can_pack)
        self.parameters = [p for _, p in trainable_parameters(model)]
        self._gradient_sum = GradientSum(self.parameters, plan.processes)
        self.optimizer = build_optimizer(trainable_parameters(model), plan.settings, plan.lora_plus_ratio)
        self.scaler = torch.amp.GradScaler(plan.processes.device.type, enabled=plan.precision == "fp16")
        self.state, self._planned_tokens = TrainingState(), plan.micro_batch_tokens
        self.callbacks, self._signals = tuple(callbacks), SignalListener()
        self.stopped_by: str | None = None  # the code of the finding that stopped the run

    @property
    def signal_number(self) -> int:
        """The signal that this process received during training; 0: none.

        One that comes in the last step does not stop the run: whoever starts another run must check this.
        """
        return self._signals.number

    def fit(self, resume: bool = False) -> TrainingState:
        """Train to the end of the schedule (or an early stop), with validations and checkpoints on the way.

        Args:
            resume: continue after the newest intact checkpoint.

        Raises:
            TrainingError: the loss or a gradient is not finite. The update is not applied.
            InterruptedRunError: SIGINT or SIGTERM came; a checkpoint has been saved.
        """
        if resume:
            self.state = self.checkpoints.restore(self.model, self.optimizer, self.scaler, self.processes.index)
            self.processes.wait_for_all()
            if self.processes.is_main:  # a kill may have come before older checkpoints were deleted
                self.checkpoints.delete_outdated(self.state)
            logger.info("resuming after step %d of %d", self.state.step, self.schedule.total_steps)
        self.set_token_budget()
        logger.info("micro-batches of at most %d tokens", self.micro_batch_tokens)
        self.notify_callbacks("on_train_start")
        try:
            with self._signals, keep_freed_memory():
                self._run_steps()
        except BaseException as error:
            self.notify_callbacks("on_exception", error)
            raise
        self.notify_callbacks("on_train_end")
        return self.state

    def set_token_budget(self) -> None:
        """Set the most tokens of a micro-batch, unless a checkpoint has restored it.

        Cost: on a GPU that counts its memory, with `micro_batch_tokens: auto`, one forward and backward pass of the
        longest examples. Not with layers of 8 bits, which a first pass with gradients breaks: the plan's number holds.
        """
        tokens, device = self.micro_batch_tokens, self.processes.device
        is_open = self.state.micro_batch_tokens is None and self.settings.micro_batch_tokens == "auto"
        if is_open and counts_memory(device) and not has_8bit_layers(self.model):
            tokens = self.processes.reduce_min(
                measure_token_budget(device, self.run_longest_batch, sum(p.numel() for p in self.parameters))
            )
        self.state = replace(self.state, micro_batch_tokens=tokens)

    def run_longest_batch(self, tokens: int = REHEARSED_TOKENS) -> int:
        """Run a forward and backward pass of the longest examples and discard the gradients; returns its tokens.

        Args:
            tokens: at most so many, unless one example has more.
        """
        batch = self.dataloader.longest_batch(tokens)
        self.model.train()
        try:
            with preserve_rng_state():
                self._micro_batch_losses(batch, step=0)[0].backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return batch.input_ids.numel()

    def _run_steps(self) -> None:
        if self.state.step == 0 and self.validation is not None:
            with base_only(self.model):
                self._validate(base=True)
        plans = self.schedule.iterate_steps(after=self.state.step)
        for plan in self.dataloader.iterate_steps(plans, lambda: self.micro_batch_tokens):
            if self._should_stop_early():  # before the step: a resumed run may have stopped already
                logger.info("early stop: no better validation since step %d", self.state.best_step)
                return
            report = self.train_step(plan)
            self.state = self.state.count_step(report)
            self.notify_callbacks("on_step_end", report)
            if self.is_validation_due(plan.number):
                self._validate()
                trim_heap()  # validation's blocks would fragment the heap for later steps; costs milliseconds
            elif self.is_sample_due(plan.number):
                self._validate_sample()
                trim_heap()
            is_stopped = self._is_stop_requested()
            if is_stopped and not self.is_validation_due(plan.number):
                self._validate()  # as at any other end of the run
            if is_stopped or self._is_checkpoint_due(plan.number):
                self._save_checkpoint()
            self._stop_if_interrupted()
            if is_stopped:
                logger.warning("stopped after step %d by lens.stop_on: %s", self.state.step, self.stopped_by)
                return

    def train_step(self, plan: StepPlan) -> StepReport:
        """One optimizer update: forward and backward over the micro-batches of `plan`, clip, update."""
        started = time.perf_counter()
        counts = self.dataset.supervised_counts[plan.examples]
        targets = int(counts.sum())
        row_sums = self._accumulate_gradients(plan, targets)
        self.scaler.unscale_(self.optimizer)
        self.notify_callbacks("on_gradients", plan.number)
        norm = grad_norm(self.parameters)
        nll, *row_nll, norm_value = torch.cat([row_sums, norm[None]]).tolist()  # the step's one sync point
        losses = np.empty(len(row_nll))
        losses[order_by_length(plan.examples, self.dataset.lengths)] = row_nll
        report = StepReport(
            step=plan.number,
            epoch=plan.number / self.schedule.steps_per_epoch,
            loss=nll / targets,
            grad_norm=norm_value,
            lr=lr_at(plan.number, self.schedule.total_steps, self.settings),
            tokens=int(self.dataset.lengths[plan.examples].sum()),
            supervised_tokens=targets,
            seconds=0.0,
            example_ids=tuple(self.dataset.example_id(int(i)) for i in plan.examples),
            row_losses=tuple((losses / counts).tolist()),
            row_tokens=tuple(counts.tolist()),
            finite=math.isfinite(nll) and (self.scaler.is_enabled() or math.isfinite(norm_value)),
        )
        if not report.finite:
            good = self.checkpoints.find_newest_intact()
            raise build_not_finite_error(report, good, self.model, self.state.base_validation_loss)
        clip_gradients(self.parameters, norm, self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = report.lr * group["lr_factor"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return replace(report, seconds=time.perf_counter() - started)

    def _accumulate_gradients(self, plan: StepPlan, targets: int) -> torch.Tensor:
        """Accumulate gradients of (sum of token losses / targets) over micro-batches and processes.

        Returns that sum, and the sum of each row, longest first, as one tensor (1 + rows,). If memory runs out, the
        step starts over with smaller micro-batches, and the run keeps their size.
        """
        self.model.train()
        while (sums := self._try_micro_batches(plan, targets)) is None:
            self.optimizer.zero_grad(set_to_none=True)
            free_memory()
        self._gradient_sum.finish()
        return self.processes.reduce_sum(sums)

    def _try_micro_batches(self, plan: StepPlan, targets: int) -> torch.Tensor | None:
        """This process's part of `_accumulate_gradients`; None if memory ran out and smaller micro-batches may fit."""
        sums = torch.zeros(1 + len(plan.examples), device=self.processes.device)
        loss_sum, own_rows = sums[0], [sums[:0]]
        self._gradient_sum.begin_passes()
        try:
            for batch, counts, is_last in self.dataloader.passes(plan, self.micro_batch_tokens):
                nll, row_nll = self._micro_batch_losses(batch, plan.number)
                if not nll.requires_grad:
                    raise TrainingError(NO_GRADIENT)
                if is_last:
                    self._gradient_sum.begin_last_pass()
                self.scaler.scale(nll / targets if counts else nll * 0).backward()
                if counts:
                    loss_sum += nll.detach()
                    own_rows.append(row_nll)
        except Exception as error:  # running out of memory has several exception types
            tokens = self.dataloader.largest_divisible(plan, self.micro_batch_tokens)
            if not is_out_of_memory(error) or not tokens or self.processes.is_base_sharded:
                raise  # with a sharded base no process can start over alone
            logger.warning(
                "out of memory with micro-batches of %d tokens; now %d: %s", tokens, tokens // 2, describe_error(error)
            )
            self.state = replace(self.state, micro_batch_tokens=tokens // 2)
            return None
        mine = torch.from_numpy(self.dataloader.own_places(plan)).to(sums.device)
        sums[1:].masked_scatter_(mine, torch.cat(own_rows))
        return sums

    def _micro_batch_losses(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a micro-batch, summed over its supervised tokens, and over those of each row."""
        keys = draw_example_keys(self.schedule.seed, step, batch.positions)
        with autocast(self.processes.device, self.precision):
            packed, padded = (batch.lengths, ()) if batch.is_packed else ((), batch.lengths)
            return self.engine.row_losses(batch.input_ids, batch.loss_mask, packed, padded, keys)

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens in one forward pass: as planned, or as memory was measured to hold."""
        return self.state.micro_batch_tokens or self._planned_tokens

    def is_validation_due(self, step: int) -> bool:
        """Whether the run validates after this step, if it has validation rows."""
        return step == self.schedule.total_steps or self._is_due(step, self.settings.eval_steps)

    def is_sample_due(self, step: int) -> bool:
        """Whether the run validates its validation sample alone after this step."""
        sample = self.validation_sample
        return sample is not None and step % sample.every == 0 and not self.is_validation_due(step)

    def _is_checkpoint_due(self, step: int) -> bool:
        is_best, is_last = self.state.best_step == step, step == self.schedule.total_steps
        save_steps = self.settings.save_steps or self.settings.eval_steps
        return is_last or is_best or self._should_stop_early() or self._is_due(step, save_steps)

    def _is_due(self, step: int, every: int | None) -> bool:
        return step % (every or self.schedule.steps_per_epoch) == 0

    def _should_stop_early(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def _validate(self, base: bool = False) -> None:
        if self.validation is not None and (report := self._evaluate_dataset(self.validation)):
            if self.validation_sample is not None:
                report = self.validation_sample.add_loss(report, self.validation.supervised_counts)
            s = self.state
            self.state = replace(s, base_validation_loss=report.loss) if base else s.count_evaluation(report.loss)
            self.notify_callbacks("on_evaluate", s.step, report, base=base)

    def _validate_sample(self) -> None:
        """Validate the sample: it is shown, and neither chooses the adapter nor stops the run, as all rows do."""
        assert self.validation is not None and self.validation_sample is not None
        if report := self._evaluate_dataset(self.validation.select(self.validation_sample.positions)):
            self.notify_callbacks("on_evaluate_sample", self.state.step, report)

    def _evaluate_dataset(self, dataset: TokenDataset) -> LossReport | None:
        """The loss on `dataset`; None if the evaluation failed, which is logged and does not end the run."""
        done = 0

        def report_progress(examples: float) -> None:
            nonlocal done
            done += int(examples) * self.processes.count
            self.notify_callbacks("on_evaluate_progress", min(done, len(dataset)), len(dataset))

        options = EvaluationOptions(
            self.processes, self.precision, self.micro_batch_tokens, self.pad_id, report_progress
        )
        try:
            return evaluate_loss(self.model, dataset, options)
        except EvaluationError as error:
            logger.warning("step %d: no validation: %s Training continues.", self.state.step, error)
            return None

    def _save_checkpoint(self) -> None:
        random = gather_rng_states(self.processes)
        if self.processes.is_main:
            self.notify_callbacks("on_save")
            folder = self.checkpoints.save(self.model, self.optimizer, self.scaler, self.state, random)
            self.notify_callbacks("on_checkpoint", folder)
        trim_heap()
        self.processes.wait_for_all()

    def _stop_if_interrupted(self) -> None:
        number = self._signals.sum_numbers(self.processes)
        if number and self.state.step < self.schedule.total_steps:
            self._save_checkpoint()
            raise InterruptedRunError(
                f"stopped after step {self.state.step} of {self.schedule.total_steps}; it is saved.",
                self.signal_number or number,
            )

    def request_stop(self, reason: str) -> None:
        """Stop after this step as an early stop does: saved, with the best validated step as its adapter."""
        self.stopped_by = self.stopped_by or reason

    def _is_stop_requested(self) -> bool:
        """Whether any process requested a stop; synchronizes them if there are several."""
        if self.processes.count == 1:
            return self.stopped_by is not None
        return bool(self.processes.reduce_sum(torch.tensor(float(self.stopped_by is not None))).item())

    def notify_callbacks(self, event: str, *args: Any, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args, **kwargs)
