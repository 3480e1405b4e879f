"""Estimates a run's duration and peak memory from a few of its own steps.

A small model is measured with its weights. A large one is measured as two thin models (fewer layers, random weights),
and extrapolated linearly in the number of layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from training_lens.data.batching import StepPlan, shard_positions, split_micro_batches
from training_lens.errors import EstimateError, OutOfMemoryError
from training_lens.evaluation.evaluator import EvaluationOptions, evaluate_loss
from training_lens.models.factory import load_thinned
from training_lens.models.fast.install import uninstall_kernels
from training_lens.training.adapted_base import build_trainer
from training_lens.training.loop.checkpoint_manager import CheckpointManager
from training_lens.training.loop.memory_budget import affordable_tokens, explain_out_of_memory, measure_token_bytes
from training_lens.training.loop.trainer import Trainer
from training_lens.training.plan import RunPlan
from training_lens.training.preflight.first_steps import require_gradients
from training_lens.training.samples import SampleAnswerer
from training_lens.training.step_costs import (
    PEAK_MARGIN,
    StepPace,
    count_run_tokens,
    count_step_tokens,
    count_validated_tokens,
    extrapolate_pace,
    first_steps,
    measure_pace,
    micro_batch_sizes,
)
from training_lens.utils.devices import available_bytes, counts_memory, keep_freed_memory, peak_bytes, reset_peak
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.processor_load import OtherPrograms
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
Measured = TypeVar("Measured")
SMALL_MODEL = 100_000_000  # parameters
THIN_LAYERS = (1, 3)  # of the two thin models
SAMPLED_STEPS = 8
SAMPLED_ROWS = 64  # validation rows
SAMPLED_TOKENS = 4  # of each sampled answer: their memory is that of the decoder
BUDGET_SECONDS = 20.0
STILL_LR = 1e-9
LEAST_MEASURED = 4  # steps, however long they take; slow ones are cut to one micro-batch
SLOW_STEP = 2.0  # seconds


@dataclass(frozen=True)
class RunEstimate:
    """A prediction: seconds of the optimizer steps and of the validations, peak bytes.

    `seconds_low` to `seconds_high`: a 95 % interval, from the spread of the measured steps and at least 20 %; beside
    other programs wider. `others_share`: what these used of the processor while steps were measured.
    `micro_batch_tokens`: most tokens in one pass that the run would choose with the memory that is free now;
    `layers`: of the thin models, empty if the whole model was measured.
    """

    seconds: float
    seconds_low: float
    seconds_high: float
    validation_seconds: float
    peak_bytes: int
    micro_batch_tokens: int
    measured_steps: int
    layers: tuple[int, ...]
    others_share: float


@dataclass(frozen=True)
class StepCost:
    """What training costs for each token (padding included, unless `is_packed`), a validation's seconds, peak bytes.

    `micro_batch_tokens`: most tokens in one of the measured passes.
    """

    pace: StepPace
    validation: float
    peak: float
    is_packed: bool
    micro_batch_tokens: int


def estimate_run(plan: RunPlan) -> RunEstimate | None:
    """The estimate of a planned run; None, with the reason logged, if it cannot be measured.

    Cost: the measured steps, at most about 20 s, and the memory of the model (or the thin models).

    Raises:
        TrainingLensError: what would also stop the run: weights that cannot be loaded, a first step that is not
            finite, too little memory.
    """
    whole = plan.parameters < SMALL_MODEL
    try:
        with explain_out_of_memory(plan.config):
            if whole:
                model = plan.load_base()
                trainer = _build_still_trainer(plan, model)
                trainer.set_token_budget()
                measured = _measure_steps(replace(plan, micro_batch_tokens=trainer.micro_batch_tokens), trainer)
                uninstall_kernels(trainer.model)
            else:
                measured = _extrapolate_from_thin_models(plan)
    except EstimateError as error:
        logger.warning("no estimate of duration and memory: %s", error)
        return None
    plan = replace(plan, micro_batch_tokens=measured.micro_batch_tokens)
    seconds = measured.pace.seconds_per_token * count_run_tokens(plan, measured.is_packed)
    low, high = measured.pace.bounds(seconds)
    return RunEstimate(
        seconds=seconds,
        seconds_low=low,
        seconds_high=high,
        validation_seconds=measured.validation * count_validated_tokens(plan),
        peak_bytes=round(PEAK_MARGIN * measured.peak),
        micro_batch_tokens=measured.micro_batch_tokens,
        measured_steps=measured.pace.steps,
        layers=() if whole else THIN_LAYERS,
        others_share=measured.pace.others_share,
    )


def _extrapolate_from_thin_models(plan: RunPlan) -> StepCost:
    """Measure two thin models and extrapolate linearly in the number of layers."""
    if plan.config.model.quantization != "none":
        raise EstimateError("a large quantized model cannot be measured thin.")
    further = (plan.facts.layers - THIN_LAYERS[0]) / (THIN_LAYERS[1] - THIN_LAYERS[0])
    if counts_memory(plan.processes.device) and plan.config.training.micro_batch_tokens == "auto":
        plan = replace(plan, micro_batch_tokens=_plan_measured_budget(plan, further))
    thin = [_measure_thin_model(plan, layers, _measure_steps) for layers in THIN_LAYERS]

    def extrapolate(first: float, second: float) -> float:
        return first + further * max(0.0, second - first)

    one, two = thin
    return replace(
        two,
        pace=extrapolate_pace(one.pace, two.pace, further),
        validation=extrapolate(one.validation, two.validation),
        peak=extrapolate(one.peak, two.peak),
    )


def _plan_measured_budget(plan: RunPlan, further: float) -> int:
    """The token budget that the run will measure with the whole model, from the passes of two thin ones."""
    device = plan.processes.device

    def measure(_plan: RunPlan, trainer: Trainer) -> float:
        found = measure_token_bytes(device, trainer.run_longest_batch)
        if found is None:
            raise EstimateError(f"a pass of {THIN_LAYERS[-1]} layers does not fit into memory.")
        return found

    first, second = (_measure_thin_model(plan, layers, measure) for layers in THIN_LAYERS)
    token_bytes = first + further * max(0.0, second - first)
    return affordable_tokens(available_bytes(device), replace(plan.needs, token=token_bytes), device)


def _measure_thin_model(plan: RunPlan, layers: int, measure: Callable[[RunPlan, Trainer], Measured]) -> Measured:
    """What `measure` gives for a thin model, with a fresh adapter since a saved one has all layers.

    Failures other than memory are `EstimateError`s: they say nothing about the run, whose model is not cut.
    """
    config = plan.config.replace_keys(peft={"from_adapter": None})
    try:
        model = load_thinned(config.model, layers, plan.processes.device, plan.precision, config.data.new_tokens)
        trainer = _build_still_trainer(replace(plan, config=config), model)
        try:
            return measure(plan, trainer)
        finally:  # kernels and modules refer to each other, which would keep the weights alive
            uninstall_kernels(trainer.model)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
            raise
        raise EstimateError(
            f"the model cannot be cut to {layers} layers to be measured: {describe_error(error)}"
        ) from error


def _build_still_trainer(plan: RunPlan, model: Any) -> Trainer:
    """The plan's trainer with almost no learning rate: later steps then fail only if the first one does."""
    still = replace(plan, config=plan.config.replace_keys(training={"lr": STILL_LR}))
    return build_trainer(still, model, CheckpointManager(Path("unused"), ""))


def _measure_steps(plan: RunPlan, trainer: Trainer) -> StepCost:
    """Time sampled steps and validation rows of the plan with this trainer, as a run takes them."""
    device, is_packed = plan.processes.device, trainer.engine.can_pack
    reset_peak(device)
    seconds, tokens = list[float](), list[int]()
    started = time.perf_counter()
    with keep_freed_memory(), _sampled_answers(plan, trainer):
        largest, *sample = _sample_steps(plan, is_packed)
        first = trainer.train_step(_cut_step(plan, largest, is_packed))  # warms up, and is the largest: sets the peak
        require_gradients(trainer, first, plan.facts.vocabulary)
        is_slow, others = time.perf_counter() - started > SLOW_STEP, OtherPrograms()
        for step in sample:
            step = _cut_step(plan, step, is_packed) if is_slow else step
            seconds.append(trainer.train_step(step).seconds)
            tokens.append(count_step_tokens(plan, step, is_packed))
            if len(seconds) >= LEAST_MEASURED and time.perf_counter() - started > BUDGET_SECONDS / 2:
                break
        others_share = others.share() if device.type == "cpu" else 0.0
        validation = _validation_seconds(plan, trainer) if plan.validation is not None else 0.0
    pace = measure_pace(seconds, tokens, others_share)
    return StepCost(pace, validation, float(peak_bytes(device)), is_packed, plan.micro_batch_tokens)


@contextmanager
def _sampled_answers(plan: RunPlan, trainer: Trainer) -> Iterator[None]:
    """Before the block base and adapter answer the run's sample prompts, as in the run; in it their decoder is kept."""
    answerer = SampleAnswerer(
        replace(plan, config=plan.config.replace_keys(tracking={"sample_tokens": SAMPLED_TOKENS}))
    )
    try:
        for base in (True, False) if answerer.prompts else ():
            answerer.answer(trainer, base)
    except Exception as error:  # the run goes on without samples, too
        logger.debug("no sampled answers in the estimate: %s", describe_error(error))
    try:
        yield
    finally:
        answerer.close()


def _cut_step(plan: RunPlan, step: StepPlan, is_packed: bool) -> StepPlan:
    """The step with the examples of its first and largest micro-batch alone."""
    lengths, processes = plan.train.lengths, plan.processes
    positions = shard_positions(step.examples, lengths, processes.index, processes.count)
    return replace(step, examples=split_micro_batches(positions, lengths, plan.micro_batch_tokens, is_packed)[0])


def _validation_seconds(plan: RunPlan, trainer: Trainer) -> float:
    """Seconds per token of a validation."""
    assert plan.validation is not None
    sample = plan.validation.select(plan.validation.spread_positions(SAMPLED_ROWS))
    budget = plan.micro_batch_tokens
    started = time.perf_counter()
    evaluate_loss(trainer.model, sample, EvaluationOptions(plan.processes, plan.precision, budget, trainer.pad_id))
    return (time.perf_counter() - started) / int(sample.lengths.sum())


def _sample_steps(plan: RunPlan, is_packed: bool) -> list[StepPlan]:
    """The step with the largest micro-batch, then steps spread evenly over the sample."""
    steps = first_steps(plan)
    largest = max(steps, key=lambda step: max(micro_batch_sizes(plan, step, is_packed)))
    spread = np.unique(np.linspace(0, len(steps) - 1, SAMPLED_STEPS).astype(int))
    return [largest, *(steps[i] for i in spread)]
