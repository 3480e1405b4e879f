"""Which rows of a split are shown, and in which order: filters over whole columns, then the search in texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from training_lens.ui.data_splits import RowSplit, RunRows
    from training_lens.ui.row_marks import RowMarks

Sort = Literal["order", "length", "-length", "loss", "-loss"]
MOST_SEARCHED, MOST_TOKENS = 20_000, 20_000_000  # rows and tokens that one search reads
CHUNK = 500  # rows that are decoded in one call


@dataclass(frozen=True)
class RowFilters:
    """What a row must have to be shown; None and infinite bounds leave all.

    `losses` leave out rows whose loss is unknown if either bound is finite. `suspects` is a list's name, '1' or 'all',
    see `RowMarks.find_suspects`. `text` must occur in the row as the model sees it, in any case of letters.
    """

    source: str | None = None
    domain: str | None = None
    without_domain: bool = False
    lengths: tuple[float, float] = (-np.inf, np.inf)
    losses: tuple[float, float] = (-np.inf, np.inf)
    suspects: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class FoundRows:
    """The positions of rows in the requested order, and a remark where the search stopped early."""

    positions: np.ndarray
    remark: str | None = None


def filter_columns(split: RowSplit, marks: RowMarks, filters: RowFilters) -> np.ndarray:
    """Which rows pass all filters but the text, (rows,) bool."""
    kept = np.ones(len(split.dataset), dtype=bool)
    if filters.source is not None:
        kept &= split.sources.find_rows(filters.source)
    if filters.domain is not None or filters.without_domain:
        kept &= split.domains.find_rows(filters.domain)
    for values, (least, most) in ((split.dataset.lengths, filters.lengths), (marks.losses, filters.losses)):
        if np.isfinite(least):
            kept &= values >= least
        if np.isfinite(most):
            kept &= values <= most
    if filters.suspects is not None:
        kept &= marks.find_suspects(filters.suspects)
    return kept


def sort_rows(positions: np.ndarray, split: RowSplit, marks: RowMarks, sort: Sort) -> np.ndarray:
    """The positions in another order; equal rows stay as they stand, those without a loss come last."""
    if sort == "order":
        return positions
    values = (marks.losses if sort.endswith("loss") else split.dataset.lengths)[positions]
    ordered: np.ndarray = positions[np.argsort(-values if sort.startswith("-") else values, kind="stable")]
    return ordered


def search_text(rows: RunRows, split: RowSplit, positions: np.ndarray, text: str) -> FoundRows:
    """Those of the rows whose text has `text` in it, of at most 20,000 rows and 20 M tokens, read in this order."""
    wanted, rules = text.casefold(), rows.token_rules
    lengths, hits, read, tokens = split.dataset.lengths, list[int](), 0, 0
    while read < min(len(positions), MOST_SEARCHED) and tokens < MOST_TOKENS:
        chunk = positions[read : min(read + CHUNK, MOST_SEARCHED)].tolist()
        texts = rules.decode_batch([split.read_row(i).input_ids.tolist() for i in chunk], skip_special_tokens=False)
        hits += [i for i, found in zip(chunk, texts, strict=True) if wanted in found.casefold()]
        read, tokens = read + len(chunk), tokens + int(lengths[chunk].sum())
    remark = None
    if read < len(positions):
        remark = (
            f"The search stopped after {read:,} of {len(positions):,} rows. Narrow the other filters to search the "
            "rest."
        )
    return FoundRows(np.array(hits, dtype=np.int64), remark)
