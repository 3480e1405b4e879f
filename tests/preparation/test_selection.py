"""Splits are exact, complete, decided by content and seed; strata have their share, groups stay whole."""

from __future__ import annotations

import numpy as np
import pytest

from training_lens.preparation.selection import (
    split_counts,
    split_groups,
    split_random,
    split_stratified,
    stratum_counts,
)

SHARES = [0.8, 0.1, 0.1]


def keys(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, rows, dtype=np.uint64)


@pytest.mark.parametrize("shares", [[1.0], [0.9, 0.1], SHARES, [1 / 3] * 3, [0.98, 0.01, 0.01]])
@pytest.mark.parametrize("rows", [3, 4, 10, 99, 1000])
def test_counts_sum_up_and_are_within_one_row_of_the_shares(rows: int, shares: list[float]) -> None:
    counts = split_counts(rows, shares)
    assert sum(counts) == rows and min(counts) >= 1
    if min(shares) * rows >= 1:
        assert all(abs(count - share * rows) < 1 for count, share in zip(counts, shares, strict=True))


def test_random_splits_have_their_counts() -> None:
    assert np.bincount(split_random(keys(1000), SHARES, 0)).tolist() == [800, 100, 100]


def test_content_and_seed_decide_and_the_order_of_rows_does_not() -> None:
    rows = keys(500)
    one = split_random(rows, SHARES, 3)
    assert (one == split_random(rows, SHARES, 3)).all()
    assert (one[::-1] == split_random(rows[::-1], SHARES, 3)).all()
    assert (one != split_random(rows, SHARES, 4)).any()


def test_added_rows_move_few_of_the_others() -> None:
    rows = keys(2000)
    before, after = split_random(rows[:1000], SHARES, 0), split_random(rows[:1010], SHARES, 0)
    assert (before != after[:1000]).sum() <= 20
    held, again = before != 0, split_random(rows, SHARES, 0)[:1000] != 0
    assert (held & again).sum() >= 0.8 * held.sum()


def test_every_stratum_has_its_share_in_every_split() -> None:
    sizes = [400, 50, 10, 3, 1]
    strata = np.repeat(keys(len(sizes)), sizes)
    split = split_stratified(keys(len(strata), 1), strata, SHARES, 0)
    assert np.bincount(split).tolist() == split_counts(sum(sizes), SHARES)
    for stratum, size in zip(keys(len(sizes)), sizes, strict=True):
        counts = np.bincount(split[strata == stratum], minlength=3)
        assert np.abs(counts - np.array(SHARES) * size).max() < 2


@pytest.mark.parametrize(("strata", "rows"), [(100, 3), (300, 1), (7, 20)])
def test_many_small_strata_keep_the_shares_of_the_whole(strata: int, rows: int) -> None:
    shares = [0.9, 0.05, 0.05]
    names = np.repeat(keys(strata), rows)
    split = split_stratified(keys(len(names), 1), names, shares, 0)
    assert np.bincount(split).tolist() == split_counts(len(names), shares)


@pytest.mark.parametrize("seed", range(20))
def test_every_row_of_every_stratum_is_placed_and_no_split_is_empty(seed: int) -> None:
    generator = np.random.default_rng(seed)
    shares = list(generator.dirichlet(np.ones(generator.integers(2, 6))))
    sizes = generator.integers(1, 20, generator.integers(6, 60))
    counts = stratum_counts(sizes, shares)
    assert counts.sum(axis=1).tolist() == sizes.tolist() and counts.min() >= 0
    assert counts.sum(axis=0).tolist() == split_counts(int(sizes.sum()), shares)


def test_the_order_of_rows_and_strata_decides_nothing() -> None:
    names, rows = np.repeat(keys(40), 5), keys(200, 1)
    one, other = split_stratified(rows, names, SHARES, 3), split_stratified(rows[::-1], names[::-1], SHARES, 3)
    assert (one[::-1] == other).all() and (one != split_stratified(rows, names, SHARES, 4)).any()


@pytest.mark.parametrize("seed", range(8))
def test_groups_stay_whole_and_no_split_is_empty(seed: int) -> None:
    """Sizes from 1 to hundreds, as users' rows are."""
    generator = np.random.default_rng(seed)
    sizes = np.minimum(generator.zipf(1.6, generator.integers(3, 60)), 300)
    groups = generator.permutation(np.repeat(keys(len(sizes), seed), sizes))
    split = split_groups(groups, SHARES, seed)
    for group in np.unique(groups):
        assert len(np.unique(split[groups == group])) == 1
    assert set(split.tolist()) == {0, 1, 2}


def test_small_groups_meet_the_shares() -> None:
    groups = np.repeat(keys(500), 4)
    counts = np.bincount(split_groups(groups, SHARES, 0))
    assert np.abs(counts - np.array([1600, 200, 200])).max() <= 4


def test_a_group_larger_than_the_training_share_still_leaves_the_others_some() -> None:
    groups = np.concatenate([np.full(97, 1), [2, 2, 3]]).astype(np.uint64)
    for seed in range(6):
        assert set(split_groups(groups, SHARES, seed).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("seed", range(6))
def test_shares_that_groups_can_meet_are_met(seed: int) -> None:
    one_large = np.concatenate([np.full(80, 999), np.arange(20)]).astype(np.uint64)
    assert np.bincount(split_groups(one_large, [0.8, 0.2], seed)).tolist() == [80, 20]
    users = np.repeat(keys(300), np.minimum(np.random.default_rng(seed).zipf(1.6, 300), 300))
    counts = np.bincount(split_groups(users, SHARES, seed))
    assert np.abs(counts - np.array(SHARES) * len(users)).max() < 1


def test_large_groups_come_into_every_split() -> None:
    sizes = np.repeat([40, 4], 100)
    groups = np.repeat(keys(200), sizes)
    large = np.repeat(sizes == 40, sizes)
    counts = np.bincount(split_groups(groups, SHARES, 0)[large], minlength=3) / 40
    assert (np.abs(counts - np.array(SHARES) * 100) < 12).all() and counts.min() >= 2
