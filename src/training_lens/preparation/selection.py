"""Choose rows and splits: remove duplicates, assign splits, find leaks between splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from training_lens.config.data_sections import PrepareSection
from training_lens.data.examples import Example
from training_lens.errors import DatasetError
from training_lens.preparation.corpus import Corpus, RowCatalogue
from training_lens.preparation.deduplication import (
    NearIndex,
    Rows,
    combine_digests,
    find_conflicts,
    find_first_equal,
    find_near_duplicates,
)
from training_lens.preparation.leakage import DROPPED, Leak, find_equal_leaks, find_near_leaks
from training_lens.preparation.splitting import split_groups, split_random, split_stratified


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A row left out as a duplicate or near duplicate of an earlier one (`original`); positions."""

    kind: Literal["exact", "near"]
    row: int
    original: int
    similarity: float


@dataclass(frozen=True)
class Selection:
    """The outcome for every row.

    `split` is each row's index into `names`, or `DROPPED`; `conflicts` are kept rows (row, earlier) that answer
    differently than an earlier row with the same prompt; `removed` counts training rows removed as leaks.
    """

    names: list[str]
    split: np.ndarray
    duplicates: list[Duplicate]
    conflicts: list[tuple[int, int]]
    leaks: list[Leak]
    removed: int


def select_rows(corpus: Corpus, catalogue: RowCatalogue, settings: PrepareSection) -> Selection:
    """Deduplicate, split and find leaks, by the settings.

    Raises:
        DatasetError: too few rows or groups for the splits, no domains, or no training rows left.
    """
    duplicates = _find_duplicates(corpus, catalogue, settings)
    kept = np.ones(len(catalogue), dtype=bool)
    kept[[duplicate.row for duplicate in duplicates]] = False
    names = list(settings.splits)
    split = np.full(len(catalogue), DROPPED, dtype=np.int64)
    split[kept] = _assign_splits(catalogue, np.flatnonzero(kept), settings)
    leaks = _find_leaks(corpus, catalogue, split, settings)
    leaking = [leak.row for leak in leaks if settings.leakage == "remove" and split[leak.row] == names.index("train")]
    split[leaking] = DROPPED
    if names.index("train") not in split:
        raise DatasetError(
            f"prepare.leakage: all {len(leaking)} training rows have their like in another split, so none is left. "
            "Set prepare.leakage=check, or give other rows."
        )
    positions, strata = np.flatnonzero(kept), catalogue.hash_domains()[kept]
    conflicts = find_conflicts(
        combine_digests(strata, catalogue.whole[kept]), combine_digests(strata, catalogue.prompt[kept])
    )
    pairs = zip(*(positions[rows].tolist() for rows in conflicts), strict=True)
    return Selection(names, split, duplicates, list(pairs), leaks, len(leaking))


def _find_duplicates(corpus: Corpus, catalogue: RowCatalogue, settings: PrepareSection) -> list[Duplicate]:
    if settings.deduplicate == "none":
        return []
    strata = catalogue.hash_domains()
    first = find_first_equal(combine_digests(strata, catalogue.whole))
    repeats = first != np.arange(len(first))
    found = [Duplicate("exact", int(row), int(first[row]), 1.0) for row in np.flatnonzero(repeats)]
    if settings.deduplicate == "near":
        index = NearIndex(settings.near_threshold, settings.num_perm)
        rows = _build_row_iterator(corpus, catalogue, combine_digests(strata, catalogue.context), "near duplicates")
        near = find_near_duplicates(rows, ~repeats, catalogue.prompt, index)
        found += [Duplicate("near", row, of, similarity) for row, (of, similarity) in near.items()]
    return found


def _build_row_iterator(corpus: Corpus, catalogue: RowCatalogue, contexts: np.ndarray, title: str) -> Rows:
    def rows() -> Iterator[tuple[int, Example, int]]:
        for position, example in catalogue.enumerate_rows(corpus.read_examples(title)):
            yield position, example, int(contexts[position])

    return rows


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


def _find_leaks(corpus: Corpus, catalogue: RowCatalogue, split: np.ndarray, settings: PrepareSection) -> list[Leak]:
    """One leak per row, the strongest kind."""
    if settings.leakage == "off" or len(settings.splits) == 1:
        return []
    train = list(settings.splits).index("train")
    leaks = find_equal_leaks(catalogue.whole, catalogue.prompt, split, train)
    known = {leak.row for leak in leaks}
    index = NearIndex(settings.near_threshold, settings.num_perm)
    near = find_near_leaks(_build_row_iterator(corpus, catalogue, catalogue.context, "near leaks"), split, train, index)
    return leaks + [leak for leak in near if leak.row not in known]
