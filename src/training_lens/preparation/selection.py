"""Choose rows and splits: remove duplicates, assign splits, find leaks between splits.

Splits depend on seed and content, not on the order of rows and files: rows are ranked by a hash of (seed, content) and
the ranking is cut into splits, so added rows move few others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from training_lens.config.data_sections import PrepareSection
from training_lens.data.examples import Example
from training_lens.errors import DatasetError
from training_lens.preparation.corpus import Corpus, RowCatalogue
from training_lens.preparation.deduplication import (
    DROPPED,
    NearIndex,
    RowMatch,
    Rows,
    combine_digests,
    find_conflicts,
    find_equal_leaks,
    find_first_equal,
    find_near_duplicates,
    find_near_leaks,
    find_normalized_leaks,
    join_leaks,
)

VALIDATION = "validation"  # the split of the rows of data.validation
ROUNDING = 1e-9  # tolerance for share * count being a whole number


@dataclass(frozen=True)
class Selection:
    """The outcome for every row.

    `split` is each row's index into `names`, or `DROPPED`; `duplicates` are left out; `conflicts` are kept rows that
    answer differently than an earlier row with the same prompt; `removed` counts training rows removed as leaks.
    """

    names: list[str]
    split: np.ndarray
    duplicates: list[RowMatch]
    conflicts: list[RowMatch]
    leaks: list[RowMatch]
    removed: int


def select_rows(corpus: Corpus, catalogue: RowCatalogue, settings: PrepareSection, given: np.ndarray) -> Selection:
    """Deduplicate, split and find leaks, by the settings.

    Args:
        given: (rows,) bool, the rows of data.validation: all of them are kept, as the split 'validation'.

    Raises:
        DatasetError: too few rows or groups for the splits, no domains, or no training rows left.
    """
    duplicates = _find_duplicates(corpus, catalogue, settings, given)
    kept = ~given
    kept[[duplicate.row for duplicate in duplicates]] = False
    names = [*settings.splits, *([VALIDATION] if given.any() else [])]
    split = np.full(len(catalogue), DROPPED, dtype=np.int64)
    split[kept] = _assign_splits(catalogue, np.flatnonzero(kept), settings)
    split[given] = len(settings.splits)
    leaks = _find_leaks(corpus, catalogue, split, settings)
    leaking = [leak.row for leak in leaks if settings.leakage == "remove" and split[leak.row] == names.index("train")]
    split[leaking] = DROPPED
    if names.index("train") not in split:
        raise DatasetError(
            f"prepare.leakage: all {len(leaking)} training rows have their like in another split, so none is left. "
            "Set prepare.leakage=check, or give other rows."
        )
    positions, strata = np.flatnonzero(kept), catalogue.hash_domains()[kept]
    digests = (combine_digests(strata, hashes[kept]) for hashes in (catalogue.whole, catalogue.prompt))
    pairs = zip(*(positions[rows].tolist() for rows in find_conflicts(*digests)), strict=True)
    matches = [RowMatch("prompt", row, earlier) for row, earlier in pairs]
    return Selection(names, split, duplicates, matches, leaks, len(leaking))


def _find_duplicates(
    corpus: Corpus, catalogue: RowCatalogue, settings: PrepareSection, given: np.ndarray
) -> list[RowMatch]:
    if settings.deduplicate == "none":
        return []
    strata = np.where(given, ~catalogue.hash_domains(), catalogue.hash_domains())  # given rows are apart, and kept
    first = find_first_equal(combine_digests(strata, catalogue.whole))
    repeats = (first != np.arange(len(first))) & ~given
    found = [RowMatch("exact", int(row), int(first[row])) for row in np.flatnonzero(repeats)]
    if settings.deduplicate == "near":
        index = NearIndex(settings.near_threshold, settings.num_perm)
        rows = _build_row_iterator(corpus, catalogue, combine_digests(strata, catalogue.context), "near duplicates")
        near = find_near_duplicates(rows, ~repeats & ~given, catalogue.prompt, index)
        found += [RowMatch("near", row, *earlier) for row, earlier in near.items()]
    return found


def _build_row_iterator(corpus: Corpus, catalogue: RowCatalogue, contexts: np.ndarray, title: str) -> Rows:
    def iterate_rows() -> Iterator[tuple[int, Example, int]]:
        for position, example in catalogue.enumerate_rows(corpus.read_examples(title)):
            yield position, example, int(contexts[position])

    return iterate_rows


def _assign_splits(catalogue: RowCatalogue, kept: np.ndarray, settings: PrepareSection) -> np.ndarray:
    """The split of each kept row."""
    strata = catalogue.hash_domains()[kept]
    keys, shares = combine_digests(strata, catalogue.whole[kept]), list(settings.splits.values())
    units, what = (catalogue.group[kept], "groups") if settings.split_by == "group" else (kept, "rows")
    if len(np.unique(units)) < len(shares):
        raise DatasetError(
            f"prepare.splits: {len(np.unique(units))} {what} cannot be split into {len(shares)} splits "
            f"({', '.join(settings.splits)}). Give more rows, or fewer splits."
        )
    if settings.split_by == "group":
        return split_groups(units, shares, settings.seed)
    if settings.split_by == "random":
        return split_random(keys, shares, settings.seed)
    if not any(catalogue.domains):
        raise DatasetError(
            "prepare.split_by: the rows have no domain to split by. Name its key (data.domain.field), or take each "
            "file as a domain (data.domain.per_file=true)."
        )
    return split_stratified(keys, strata, shares, settings.seed)


def _find_leaks(corpus: Corpus, catalogue: RowCatalogue, split: np.ndarray, settings: PrepareSection) -> list[RowMatch]:
    """One leak per row, the strongest kind."""
    if settings.leakage == "off" or split.max(initial=0) == 0:
        return []
    train = list(settings.splits).index("train")
    equal = find_equal_leaks(catalogue.whole, catalogue.prompt, split, train)
    index = NearIndex(settings.near_threshold, settings.num_perm)
    near = find_near_leaks(_build_row_iterator(corpus, catalogue, catalogue.context, "near leaks"), split, train, index)
    return join_leaks(equal, find_normalized_leaks(catalogue.identity, split, train), near)


def split_counts(rows: int, shares: Sequence[float]) -> list[int]:
    """Rows per share: largest remainder, at least one each if there are enough.

    Example:
        >>> split_counts(10, [0.8, 0.1, 0.1]), split_counts(4, [0.9, 0.1]), split_counts(1, [0.9, 0.1])
        ([8, 1, 1], [3, 1], [1, 0])
    """
    counts: list[int] = _fill_empty_splits(_round_shares(rows, shares)[np.newaxis])[0].tolist()
    return counts


def stratum_counts(sizes: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Rows per stratum and share, (strata, shares) int64; the totals are those of `split_counts`.

    Every cell gets the floor of its share; leftover rows go to the largest remainders, as long as the stratum has one
    left and the split lacks one; ties go to the earlier stratum. The minimum of one row applies to whole splits, not to
    strata.

    Example:
        >>> stratum_counts(np.array([4, 3, 3]), [0.8, 0.2]).tolist()
        [[3, 1], [2, 1], [3, 0]]
    """
    exact = np.outer(sizes, shares)
    counts = np.floor(exact + ROUNDING).astype(np.int64)
    over = sizes - counts.sum(axis=1)
    lacking = _round_shares(int(sizes.sum()), shares) - counts.sum(axis=0)
    largest_first = np.argsort(counts - exact, axis=None, kind="stable")
    while over.any():  # repeat: the last rows may only fit a split where their stratum got one already
        for stratum, split in zip(*np.unravel_index(largest_first, counts.shape), strict=True):
            if over[stratum] and lacking[split]:
                counts[stratum, split] += 1
                over[stratum] -= 1
                lacking[split] -= 1
    return _fill_empty_splits(counts)


def _round_shares(rows: int, shares: Sequence[float]) -> np.ndarray:
    """Whole rows per share, by largest remainder; (shares,) int64."""
    exact = np.array(shares) * rows
    counts = np.floor(exact + ROUNDING).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return counts


def _fill_empty_splits(counts: np.ndarray) -> np.ndarray:
    """Give each empty split one row of the largest split's largest stratum; (strata, shares)."""
    counts = counts.copy()
    while counts.sum() >= counts.shape[1] and not (whole := counts.sum(axis=0)).all():
        largest = int(np.argmax(whole))
        stratum = int(np.argmax(counts[:, largest]))
        counts[stratum, largest] -= 1
        counts[stratum, int(np.argmin(whole))] += 1
    return counts


def split_random(keys: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """The split of each row, as an index into `shares`; int64. `keys` (rows,) uint64 are hashes of the contents."""
    splits = np.repeat(np.arange(len(shares)), split_counts(len(keys), shares))
    assigned = np.empty(len(keys), dtype=np.int64)
    assigned[np.argsort(_mix_hash(keys, seed), kind="stable")] = splits
    return assigned


def split_stratified(keys: np.ndarray, strata: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Like `split_random` within each stratum (rows,) uint64: each has its share in every split, up to rounding."""
    names, inverse, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    order = np.argsort(_mix_hash(names, seed), kind="stable")
    place = np.argsort(order)[inverse]  # rank of each row's stratum
    counts = stratum_counts(sizes[order], shares)
    rows = np.lexsort((_mix_hash(keys, seed), place))  # by stratum, then by rank within it
    assigned = np.empty(len(keys), dtype=np.int64)
    assigned[rows] = np.repeat(np.tile(np.arange(len(shares)), len(names)), counts.ravel())
    return assigned


def split_groups(groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Like `split_random` with whole groups: largest first, the smallest fill the gaps.

    A group goes to a random split that lacks at least its rows, weighted by how many it lacks, so every split gets
    small and large groups; if none fits, to the split that lacks most. A split that stays empty takes the smallest
    group of a split with several. `groups` (rows,) uint64 are hashes, at least as many distinct ones as shares.
    """
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    assert len(names) >= len(shares)
    ranks = _mix_hash(names, seed)
    draws = (ranks & np.uint64(0xFFFFFFFF)) / 2.0**32  # from the bits that matter least for the rank
    lacking = np.array(shares) * len(groups)
    split_of = np.empty(len(names), dtype=np.int64)
    for group in np.lexsort((ranks, -sizes)):
        split_of[group] = _draw_split(sizes[group], lacking, draws[group])
        lacking[split_of[group]] -= sizes[group]
    for empty in sorted(set(range(len(shares))) - set(split_of.tolist())):
        several = np.bincount(split_of, minlength=len(shares))[split_of] > 1
        split_of[np.argmin(np.where(several, sizes, len(groups) + 1))] = empty
    return np.take(split_of, inverse)


def _draw_split(size: int, lacking: np.ndarray, draw: float) -> int:
    """A split that lacks `size` rows, by `draw` in [0, 1), weighted by what it lacks; else the one that lacks most."""
    room = np.where(lacking + ROUNDING >= size, lacking, 0.0).cumsum()
    return int(np.searchsorted(room, draw * room[-1], side="right")) if room[-1] > 0 else int(np.argmax(lacking))


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
