"""The rows of a step whose loss spikes, as the adapter and the base see them, beside similar rows and others."""

from __future__ import annotations

from typing import Any

import numpy as np

from training_lens.analysis.findings.loss_spike import RowLoss, SpikeRows
from training_lens.data.columns import mask_first_tokens
from training_lens.data.token_dataset import TokenDataset
from training_lens.evaluation.evaluator import EvaluationOptions, token_sums
from training_lens.models.adapters import base_only

COMPARED = 16  # rows drawn at random, and rows that resemble the hardest one
SCANNED = 20_000  # rows among which those are looked for


def measure_spike_rows(trainer: Any, step: int) -> SpikeRows:
    """The losses of the step's rows now and in the base, and the base's on other rows. Changes nothing.

    Cost: a forward pass over the step's rows, one of the base over them and 32 others, and a pass over the tokens of
    at most 20,000 rows.
    """
    dataset, positions = trainer.dataset, _list_rows(trainer, step)
    now, base = _measure_losses(trainer, positions, False), _measure_losses(trainer, positions, True)
    rows = [
        RowLoss(dataset.example_id(int(i)), *pair)
        for i, *pair in zip(positions, now.tolist(), base.tolist(), strict=True)
    ]
    others = np.setdiff1d(np.arange(len(dataset)), positions)
    drawn = np.random.Generator(np.random.PCG64(step)).permutation(others)[:SCANNED]
    usual = np.sort(drawn[:COMPARED])
    similar = find_similar_rows(dataset, int(positions[np.argmax(base)]), np.sort(drawn), COMPARED)
    return SpikeRows(rows, _measure_losses(trainer, usual, True), _measure_losses(trainer, similar, True))


def name_spike_rows(trainer: Any, step: int) -> SpikeRows:
    """The step's rows without a loss: of several processes, each would have to take part in measuring."""
    rows = [RowLoss(trainer.dataset.example_id(int(i)), np.nan, np.nan) for i in _list_rows(trainer, step)]
    return SpikeRows(rows, np.zeros(0), np.zeros(0))


def _list_rows(trainer: Any, step: int) -> np.ndarray:
    return np.asarray(next(trainer.schedule.iterate_steps(after=step - 1)).examples)


def _measure_losses(trainer: Any, positions: np.ndarray, base: bool) -> np.ndarray:
    """The loss of each row per supervised token, of the base or the adapter; (rows,) float64."""
    if not len(positions):
        return np.zeros(0)
    options = EvaluationOptions(trainer.processes, trainer.precision, trainer.micro_batch_tokens, trainer.pad_id)
    with base_only(trainer.model, base):
        sums = token_sums(trainer.model, trainer.dataset.select(positions), options)
    losses: np.ndarray = sums.nll / sums.tokens
    return losses


def find_similar_rows(dataset: TokenDataset, position: int, among: np.ndarray, count: int) -> np.ndarray:
    """The rows `among` whose targets have the most in common with those of a row, ascending.

    By the share of their targets that the row has as well, each token weighted by its surprisal under the counts of
    all: rare tokens tell a language or a domain, common ones do not.
    """
    example = dataset[position]
    chosen = dataset.select(among)
    vocabulary = max(int(c.input_ids.max(initial=0)) for _, c in dataset.iterate_columns()) + 1
    counts = np.ones(vocabulary)
    for _, chunk in chosen.iterate_columns():
        counts += np.bincount(chunk.input_ids, minlength=vocabulary)
    weights = -np.log(counts / counts.sum())
    shared = np.where(np.isin(np.arange(vocabulary), example.input_ids[example.loss_mask]), weights, 0.0)
    shares = np.zeros(len(chosen))
    for positions, chunk in chosen.iterate_columns():
        taught = mask_first_tokens(chunk.response, chunk.offsets)
        rows = np.repeat(np.arange(len(chunk)), chunk.lengths)[taught]
        tokens = chunk.input_ids[taught]
        found = np.bincount(rows, shared[tokens], minlength=len(chunk))
        shares[positions] = found / np.maximum(np.bincount(rows, weights[tokens], minlength=len(chunk)), 1e-9)
    return np.sort(among[np.argsort(-shares, kind="stable")[:count]])
