"""Which split each row goes to: from the seed and what the rows say, not from their order or their files.

Rows are ranked by a hash of (seed, content), and the splits cut the ranking: so added rows move few of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDING = 1e-9  # what a share times a count may miss a whole number by


def split_counts(rows: int, shares: Sequence[float]) -> list[int]:
    """How many of `rows` each share gets: by largest remainder, and at least one each where there are enough.

    Example:
        >>> split_counts(10, [0.8, 0.1, 0.1]), split_counts(4, [0.9, 0.1]), split_counts(1, [0.9, 0.1])
        ([8, 1, 1], [3, 1], [1, 0])
    """
    counts: list[int] = _fill_empty_splits(_round_shares(rows, shares)[np.newaxis])[0].tolist()
    return counts


def stratum_counts(sizes: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """How many rows of each stratum each share gets, (strata, shares) int64; over all strata, what `split_counts` says.

    Every cell gets the whole rows of its share; those that are over go where the remainder is largest, as long as the
    stratum has one over and the split lacks one. At least one row each is for whole splits, not for a stratum's.

    Args:
        sizes: (strata,) rows of each; of equal remainders the earlier stratum's goes first.

    Example:
        >>> stratum_counts(np.array([4, 3, 3]), [0.8, 0.2]).tolist()
        [[3, 1], [2, 1], [3, 0]]
    """
    exact = np.outer(sizes, shares)
    counts = np.floor(exact + ROUNDING).astype(np.int64)
    over = sizes - counts.sum(axis=1)
    lacking = _round_shares(int(sizes.sum()), shares) - counts.sum(axis=0)
    largest_first = np.argsort(counts - exact, axis=None, kind="stable")
    while over.any():  # rows that find every split full but for one where their stratum had one more go there, too
        for stratum, split in zip(*np.unravel_index(largest_first, counts.shape), strict=True):
            if over[stratum] and lacking[split]:
                counts[stratum, split] += 1
                over[stratum] -= 1
                lacking[split] -= 1
    return _fill_empty_splits(counts)


def _round_shares(rows: int, shares: Sequence[float]) -> np.ndarray:
    """Whole rows for each share that sum up, by largest remainder; (shares,) int64."""
    exact = np.array(shares) * rows
    counts = np.floor(exact + ROUNDING).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return counts


def _fill_empty_splits(counts: np.ndarray) -> np.ndarray:
    """The counts, where a split without rows takes one of the largest split's largest stratum; (strata, shares)."""
    counts = counts.copy()
    while counts.sum() >= counts.shape[1] and not (whole := counts.sum(axis=0)).all():
        largest = int(np.argmax(whole))
        stratum = int(np.argmax(counts[:, largest]))
        counts[stratum, largest] -= 1
        counts[stratum, int(np.argmin(whole))] += 1
    return counts


def split_random(keys: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """The split of each row, as an index into `shares`; int64.

    Args:
        keys: (rows,) uint64, a hash of what each row says; equal ones are ranked by position.
    """
    splits = np.repeat(np.arange(len(shares)), split_counts(len(keys), shares))
    assigned = np.empty(len(keys), dtype=np.int64)
    assigned[_rank_keys(keys, seed)] = splits
    return assigned


def split_stratified(keys: np.ndarray, strata: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """As `split_random`, in each stratum apart: each has its share in every split, as exactly as whole rows allow.

    Args:
        strata: (rows,) uint64, a hash of each row's stratum.
    """
    names, inverse, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    order = _rank_keys(names, seed)
    place = np.argsort(order)[inverse]  # each row's stratum by its place in the ranking
    counts = stratum_counts(sizes[order], shares)
    rows = np.lexsort((_mix_hash(keys, seed), place))  # stratum after stratum, each in the ranking of its rows
    assigned = np.empty(len(keys), dtype=np.int64)
    assigned[rows] = np.repeat(np.tile(np.arange(len(shares)), len(names)), counts.ravel())
    return assigned


def split_groups(groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """As `split_random`, whole groups alone: the largest are placed first, the smallest fill what is left.

    A group goes to a split that lacks at least its rows, drawn by how many each lacks, so that every split has small
    and large groups; where it fits in none, to the one that lacks most. A split that is left empty takes the smallest
    group of one that has several.

    Args:
        groups: (rows,) uint64, a hash of each row's group; at least as many different ones as there are shares.
    """
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    assert len(names) >= len(shares)
    ranks = _mix_hash(names, seed)
    draws = (ranks & np.uint64(0xFFFFFFFF)) / 2.0**32  # of the bits that decide a rank last
    lacking = np.array(shares) * len(groups)
    split_of = np.empty(len(names), dtype=np.int64)
    for group in np.lexsort((ranks, -sizes)):
        split_of[group] = _draw_split(sizes[group], lacking, draws[group])
        lacking[split_of[group]] -= sizes[group]
    for empty in sorted(set(range(len(shares))) - set(split_of.tolist())):
        several = np.bincount(split_of, minlength=len(shares))[split_of] > 1
        split_of[np.argmin(np.where(several, sizes, len(groups) + 1))] = empty
    assigned: np.ndarray = split_of[inverse]
    return assigned


def _draw_split(size: int, lacking: np.ndarray, draw: float) -> int:
    """A split that lacks `size` rows, each with a chance as large as what it lacks; else the one that lacks most.

    Args:
        draw: in [0, 1).
    """
    room = np.where(lacking + ROUNDING >= size, lacking, 0.0).cumsum()
    return int(np.searchsorted(room, draw * room[-1], side="right")) if room[-1] > 0 else int(np.argmax(lacking))


def _rank_keys(keys: np.ndarray, seed: int) -> np.ndarray:
    """Positions in the order of a hash of (seed, key)."""
    return np.argsort(_mix_hash(keys, seed), kind="stable")


def _mix_hash(keys: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit hash of (seed, key): splitmix64's finalizer, a bijection of 64 bits.

    Source: Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014 (constants of Stafford's Mix13).
    """
    start = np.random.Generator(np.random.PCG64(seed)).integers(0, 2**64, dtype=np.uint64)
    mixed = keys.astype(np.uint64) + start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    hashed: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return hashed
