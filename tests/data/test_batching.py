"""The order is a pure function of seed and epoch; cutting keeps every example and the token budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training_lens.data.batching import (
    DataMixture,
    Schedule,
    collate,
    epoch_order,
    hold_out,
    shard_positions,
    split_micro_batches,
)
from training_lens.data.examples import TokenizedExample
from training_lens.errors import DatasetError

LENGTHS = np.random.default_rng(0).integers(5, 200, size=101)


def test_each_epoch_visits_every_example_once() -> None:
    schedule = Schedule(examples=101, global_batch=8, epochs=2, max_steps=None, seed=3)
    steps = list(schedule.iterate_steps())
    assert len(steps) == schedule.total_steps == 2 * 13
    for epoch in (0, 1):
        visited = np.concatenate([s.examples for s in steps if s.epoch == epoch])
        assert sorted(visited) == list(range(101))
    assert not np.array_equal(epoch_order(101, 3, 0), epoch_order(101, 3, 1))
    assert not np.array_equal(epoch_order(101, 3, 0), epoch_order(101, 4, 0))


@pytest.mark.parametrize("after", [0, 1, 12, 13, 20])
def test_resuming_continues_the_same_order(after: int) -> None:
    schedule = Schedule(examples=101, global_batch=8, epochs=2, max_steps=None, seed=3)
    whole = [(s.number, s.examples.tolist()) for s in schedule.iterate_steps()]
    assert [(s.number, s.examples.tolist()) for s in schedule.iterate_steps(after)] == whole[after:]


def test_weights_say_how_often_an_epoch_takes_each_entry() -> None:
    entries = np.repeat([0, 1, 2], [10, 40, 8])
    schedule = Schedule(58, 7, 2, None, 1, DataMixture(entries, (2.0, 0.5, 1.25)))
    assert schedule.epoch_examples == 20 + 20 + 10 and schedule.steps_per_epoch == 8
    epochs = [np.concatenate([s.examples for s in schedule.iterate_steps() if s.epoch == epoch]) for epoch in (0, 1)]
    for taken in epochs:
        counts = np.bincount(taken, minlength=58)
        assert (counts[:10] == 2).all()
        assert counts[10:50].sum() == 20 and counts[10:50].max() == 1
        assert counts[50:].sum() == 10 and counts[50:].min() == 1
    assert set(epochs[0][np.isin(epochs[0], np.arange(10, 50))]) != set(
        epochs[1][np.isin(epochs[1], np.arange(10, 50))]
    )
    whole = [s.examples.tolist() for s in schedule.iterate_steps()]
    assert [s.examples.tolist() for s in schedule.iterate_steps(after=9)] == whole[9:]


def test_length_of_runs() -> None:
    assert Schedule(100, 8, 0.5, None, 0).total_steps == 7
    assert Schedule(100, 8, 3, 5, 0).total_steps == 5
    assert Schedule(1, 8, 0.1, None, 0).total_steps == 1


@pytest.mark.parametrize("budget", [1, 64, 400, 10**6])
def test_cutting_keeps_all_and_the_budget(budget: int) -> None:
    positions = np.arange(101)[::2]
    parts = split_micro_batches(positions, LENGTHS, budget)
    assert sorted(np.concatenate(parts)) == sorted(positions)
    for part in parts:
        assert len(part) == 1 or len(part) * LENGTHS[part].max() <= budget


def test_shares_of_processes_are_disjoint_and_complete() -> None:
    positions = np.arange(50)
    shares = [shard_positions(positions, LENGTHS, process, 3) for process in range(3)]
    assert sorted(np.concatenate(shares)) == list(range(50))


def test_hold_out_splits_without_overlap() -> None:
    learned, held = hold_out(np.arange(100, dtype=np.uint64), 0.1, seed=1)
    assert len(held) == 10 and sorted([*learned, *held]) == list(range(100))
    assert [len(part) for part in hold_out(np.arange(2, dtype=np.uint64), 0.9, seed=1)] == [1, 1]
    few = np.arange(10, dtype=np.uint64)
    assert [[len(part) for part in hold_out(few, ratio, seed=1)] for ratio in (0.001, 0.999)] == [[9, 1], [1, 9]]


def test_without_duplicates_the_held_out_rows_are_those_of_older_runs() -> None:
    _, held = hold_out(np.arange(50, dtype=np.uint64)[::-1] * 7, 0.2, seed=3)
    order = np.random.Generator(np.random.PCG64([3, 2**31])).permutation(50)
    assert held.tolist() == sorted(order[:10].tolist())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 0.95])
def test_equal_examples_are_never_on_both_sides_of_a_hold_out(seed: int, ratio: float) -> None:
    digests = np.random.default_rng(seed).integers(0, 30, size=200, dtype=np.uint64)
    digests[:90] = 7
    learned, held = hold_out(digests, ratio, seed)
    assert sorted([*learned, *held]) == list(range(200)) and len(learned) and len(held)
    assert not set(digests[learned].tolist()) & set(digests[held].tolist())
    assert len(held) <= max(round(200 * ratio), 10)
    assert all(np.array_equal(*pair) for pair in zip(hold_out(digests, ratio, seed), (learned, held), strict=True))


def test_examples_that_all_say_the_same_cannot_be_held_out() -> None:
    with pytest.raises(DatasetError, match=r"data\.val_ratio: all 9 examples say the same"):
        hold_out(np.zeros(9, dtype=np.uint64), 0.1, seed=0)


def test_collate_pads_on_the_right_and_never_supervises_padding() -> None:
    examples = [
        TokenizedExample("a", 1, np.array([5, 6, 7], np.int32), np.array([False, True, True]), None),
        TokenizedExample("b", 1, np.array([8], np.int32), np.array([True]), None),
    ]
    batch = collate(examples, fill_id=7)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 7, 7]]
    assert batch.loss_mask.tolist() == [[False, True, True], [True, False, False]]
    assert batch.input_ids.dtype == torch.int64 and sum(batch.lengths) == 4
