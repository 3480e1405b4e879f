"""At the end of a run: the loss of answers given the prompts of other rows against that given their own."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from training_lens.analysis.findings.prompt_use import SwapGain
from training_lens.core.framework import TrainingLensFramework
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.evaluation.evaluator import EvaluationOptions, LossReport, TokenSums, estimate_error, token_sums
from training_lens.models.adapters import base_only
from training_lens.training.loop.callbacks import Callback
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
LEAST_ROWS, MOST_ROWS = 16, 64
TOKEN_SHARE, PASSES = 0.05, 5  # of the run's training tokens, in forward passes alone


class PromptSwapCheck(Callback):
    """Measures it on held-out rows, of the adapter and of the base, and on training rows; into the lens's captures.

    The right prompts' losses of held-out rows are those of the last validation, or measured anew in a run that was
    killed after it. Cost: five or six forward passes over 16 to 64 rows. A failure is logged and does not end the run;
    nothing that training reads changes.
    """

    def __init__(self, lens: TrainingLensFramework) -> None:
        self._lens = lens
        self._step, self._losses = 0, np.zeros(0)  # of the last validation: each row's summed loss
        self.seconds = 0.0

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        if report.row_nll is not None and not base:
            self._step, self._losses = step, report.row_nll

    def on_train_end(self, trainer: Any) -> None:
        started = time.perf_counter()
        try:
            step = trainer.state.step
            is_validated = step in (self._step, trainer.schedule.total_steps) and trainer.validation is not None
            if trainer.processes.count == 1 and is_validated and step:
                self._record_gains(trainer)
        except Exception as error:
            logger.warning("whether answers depend on their prompts was not measured: %s", describe_error(error))
            logger.debug("in the swapped prompts", exc_info=True)
        self.seconds += time.perf_counter() - started

    def _record_gains(self, trainer: Any) -> None:
        count = _count_rows(trainer)
        held_out = swap_prompts(trainer.validation, count)
        if len(held_out.positions) < LEAST_ROWS // 2:
            return
        is_known = self._step == trainer.state.step
        own = self._losses[held_out.positions] if is_known else self._measure_own(trainer, held_out.positions)
        gains = {"swap": compare_losses(own, _sum_losses(trainer, held_out.dataset))}
        with base_only(trainer.model):
            own = self._measure_own(trainer, held_out.positions)
            gains["base_swap"] = compare_losses(own, _sum_losses(trainer, held_out.dataset))
        train = swap_prompts(trainer.dataset, count)
        if len(train.positions) >= LEAST_ROWS // 2:
            own = _sum_losses(trainer, trainer.dataset.select(train.positions)).nll
            gains["train_swap"] = compare_losses(own, _sum_losses(trainer, train.dataset))
        values = {f"{of}_{name}": value for of, gain in gains.items() for name, value in gain._asdict().items()}
        rows = float(len(held_out.positions))
        self._lens.record_evaluation(trainer.state.step, None, sample={**values, "swap_rows": rows})

    def _measure_own(self, trainer: Any, positions: np.ndarray) -> np.ndarray:
        """The summed losses of held-out rows with their own prompts."""
        return _sum_losses(trainer, trainer.validation.select(positions)).nll


class SwappedRows(NamedTuple):
    """Rows of a dataset at `positions`, and the same answers with the prompts of other rows."""

    positions: np.ndarray
    dataset: TokenDataset


def swap_prompts(dataset: TokenDataset, count: int) -> SwappedRows:
    """At most `count` rows with one answer, spread evenly, each with the prompt of another row of its domain.

    Tokens of prompts and answers stay as they are, since both were tokenized apart. Left out are rows whose prompt
    would stay the same, and those that would be longer than the longest row.
    """
    starts = {
        int(place): start for place in dataset.spread_positions(count) if (start := _find_answer(dataset[int(place)]))
    }
    by_domain: dict[str | None, list[int]] = defaultdict(list)
    for place in starts:
        by_domain[dataset[place].domain].append(place)
    longest, positions, rows = int(dataset.lengths.max()), list[int](), list[TokenizedExample]()
    for of_domain in by_domain.values():
        for place, other in zip(of_domain, of_domain[1:] + of_domain[:1], strict=True):
            row, prompt = dataset[place], dataset[other].input_ids[: starts[other]]
            is_same = np.array_equal(prompt, row.input_ids[: starts[place]])
            if is_same or len(prompt) + len(row.input_ids) - starts[place] > longest:
                continue
            ids, mask = row.input_ids[starts[place] :], row.loss_mask[starts[place] :]
            unlearned = np.zeros(len(prompt), dtype=bool)
            joined = np.concatenate([prompt, ids]), np.concatenate([unlearned, mask])
            rows.append(replace(row, input_ids=joined[0], loss_mask=joined[1]))
            positions.append(place)
    order = np.argsort(positions)
    dataset = TokenDataset.from_examples([rows[i] for i in order])
    return SwappedRows(np.array(positions, dtype=np.int64)[order], dataset)


def _find_answer(example: TokenizedExample) -> int:
    """Where the one answer of a row begins; 0 where it has none, several, or no prompt."""
    edges = np.diff(example.loss_mask.astype(np.int8))
    begins = np.flatnonzero(edges == 1) + 1
    return int(begins[0]) if len(begins) == 1 and not example.loss_mask[0] else 0


def compare_losses(own: np.ndarray, other: TokenSums) -> SwapGain:
    """The mean gain per token of right prompts, and the standard error of that ratio of sums over rows.

    Args:
        own: (rows,) each row's summed loss given its own prompt.
        other: sums of the same rows given other prompts.
    """
    difference = other.nll - own
    error = estimate_error(difference, other.tokens)
    assert error is not None, "there are several rows"
    return SwapGain(float(difference.sum() / other.tokens.sum()), error)


def _count_rows(trainer: Any) -> int:
    """So many rows that all passes take a bounded share of the run's tokens, between the least and the most."""
    schedule, mean = trainer.schedule, float(trainer.dataset.lengths.mean())
    trained = mean * schedule.epoch_examples * schedule.total_steps / schedule.steps_per_epoch
    return int(np.clip(TOKEN_SHARE * trained / PASSES / mean, LEAST_ROWS, MOST_ROWS))


def _sum_losses(trainer: Any, dataset: TokenDataset) -> TokenSums:
    options = EvaluationOptions(trainer.processes, trainer.precision, trainer.micro_batch_tokens, trainer.pad_id)
    return token_sums(trainer.model, dataset, options)
