"""Which split each row goes to: from the seed and what the rows say, not from their order or their files.

Rows are ranked by a hash of (seed, content), and the splits cut the ranking: so added rows move few of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_counts(rows: int, shares: Sequence[float]) -> list[int]:
    """How many of `rows` each share gets: by largest remainder, and at least one each where there are enough.

    Example:
        >>> split_counts(10, [0.8, 0.1, 0.1]), split_counts(4, [0.9, 0.1]), split_counts(1, [0.9, 0.1])
        ([8, 1, 1], [3, 1], [1, 0])
    """
    exact = [share * rows for share in shares]
    counts = [int(part + 1e-9) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: rows - sum(counts)]:
        counts[i] += 1
    while rows >= len(shares) and 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def split_random(keys: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """The split of each row, as an index into `shares`; int64.

    Args:
        keys: (rows,) uint64, a hash of what each row says; equal ones are ranked by position.
    """
    splits = np.repeat(np.arange(len(shares)), split_counts(len(keys), shares))
    assigned = np.empty(len(keys), dtype=np.int64)
    assigned[_ranking(keys, seed)] = splits
    return assigned


def split_stratified(keys: np.ndarray, strata: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """As `split_random`, in each stratum apart: each has its share in every split, as exactly as whole rows allow.

    Args:
        strata: (rows,) integers; rows of one number are one stratum.
    """
    assigned = np.empty(len(keys), dtype=np.int64)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        assigned[rows] = split_random(keys[rows], shares, seed)
    return assigned


def split_groups(groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """As `split_random`, whole groups alone: they come in the ranking's order, each to the split that lacks most rows.

    A split that is left empty takes the smallest group of one that has several.

    Args:
        groups: (rows,) uint64, a hash of each row's group; at least as many different ones as there are shares.
    """
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    assert len(names) >= len(shares)
    lacking = np.array(shares) * len(groups)
    split_of = np.empty(len(names), dtype=np.int64)
    for group in _ranking(names, seed):
        split_of[group] = np.argmax(lacking)
        lacking[split_of[group]] -= sizes[group]
    for empty in sorted(set(range(len(shares))) - set(split_of.tolist())):
        several = np.bincount(split_of, minlength=len(shares))[split_of] > 1
        split_of[np.argmin(np.where(several, sizes, len(groups) + 1))] = empty
    assigned: np.ndarray = split_of[inverse]
    return assigned


def _ranking(keys: np.ndarray, seed: int) -> np.ndarray:
    """Positions in the order of a hash of (seed, key): splitmix64's finalizer, a bijection of 64 bits.

    Source: Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014 (constants of Stafford's Mix13).
    """
    start = np.random.Generator(np.random.PCG64(seed)).integers(0, 2**64, dtype=np.uint64)
    mixed = keys.astype(np.uint64) + start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
