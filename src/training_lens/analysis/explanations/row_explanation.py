"""What the recorded visits of each training row say: lists of rows to look at, each row with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from training_lens.analysis.explanations.training_rows import TrainingRows, open_rows_of
from training_lens.core.arrow import MODULE, STEP
from training_lens.core.lens_store import LensStore
from training_lens.core.table_names import HELD_OUT_LOSSES, ROW_LOSSES
from training_lens.data.canaries import SOURCE
from training_lens.data.leaks import find_near_repeats
from training_lens.display.progress import Progress
from training_lens.errors import CheckpointError, ConfigurationError, LensError
from training_lens.evaluation.evaluator import EvaluationOptions, token_sums
from training_lens.inference.session import open_run
from training_lens.measures.row_life import (
    LEARNED,
    RowLives,
    choose_threshold,
    describe_lives,
    find_components,
    score_wrong_answers,
)
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import format_count, pluralize
from training_lens.utils.processes import Processes


@dataclass(frozen=True)
class RowVisits:
    """The visits of rows, each row's in order: `steps` (rows, visits) int64, 0 where it had no more, and `losses`
    (rows, visits) in nats per supervised token, NaN there. `tokens` (rows,) are the supervised ones. The losses of one
    row in `every` were recorded."""

    ids: tuple[str, ...]
    steps: np.ndarray
    losses: np.ndarray
    tokens: np.ndarray
    every: int = 1

    @classmethod
    def from_table(cls, table: pa.Table, every: int = 1) -> RowVisits:
        """Those of a table with the columns step, module (the row's id), loss and tokens."""
        table = table.unify_dictionaries().combine_chunks()
        column = table.column(MODULE).combine_chunks()
        codes, names = column.indices.to_numpy(), column.dictionary.to_pylist()
        steps, losses, tokens = (table.column(name).to_numpy() for name in (STEP, "loss", "tokens"))
        order = np.lexsort((steps, codes))
        used, rows, counts = np.unique(codes[order], return_inverse=True, return_counts=True)
        visit = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = len(used), int(counts.max(initial=0))
        by_row = cls(
            tuple(names[code] for code in used),
            np.zeros(shape, dtype=np.int64),
            np.full(shape, np.nan),
            np.zeros(len(used), dtype=np.int64),
            every,
        )
        by_row.steps[rows, visit], by_row.losses[rows, visit] = steps[order], losses[order]
        by_row.tokens[rows] = tokens[order]
        return by_row


def read_held_out(run: RunFolder) -> RowVisits | None:
    """The losses of a run's validation rows at its validations, the base's first; None if there are none."""
    store = LensStore(run.lens)
    if HELD_OUT_LOSSES not in store.tables():
        return None
    every = int(store.manifest.settings.get(f"{HELD_OUT_LOSSES}_every") or 1)
    return RowVisits.from_table(store.table(HELD_OUT_LOSSES, ["loss", "tokens"]), every)


def read_visits(run: RunFolder) -> RowVisits:
    """The recorded visits of a run's training rows.

    Raises:
        CheckpointError: the run recorded none; says how to.
    """
    way = "Train it again with lens.enabled=true and lens.row_losses_megabytes=64, the defaults."
    try:
        store = LensStore(run.lens)
        if ROW_LOSSES not in store.tables():
            raise LensError(f"{run.lens} has no table {ROW_LOSSES}.")
        table = store.table(ROW_LOSSES, ["loss", "tokens"])
    except (LensError, OSError) as error:
        raise CheckpointError(f"the run {run.run_id} recorded no losses of single rows: {error} {way}") from error
    if not table.num_rows:
        raise CheckpointError(f"the run {run.run_id} recorded no losses of single rows. {way}")
    return RowVisits.from_table(table, int(store.manifest.settings.get("row_losses_every") or 1))


WRONG, NEVER, FORGOTTEN, LATE = "likely mislabelled", "never learned", "forgotten", "learned only at the end"
SUSPICIOUS = 3.5  # robust deviations (Iglewicz and Hoaglin: How to detect and handle outliers, 1993)
EVALUATED_TOKENS = 4096  # at most in one forward pass


@dataclass(frozen=True)
class ListedRow:
    """A row of a list: its id, why it stands there, and what is read and learned of it."""

    id: str
    reason: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class MeasuredLosses:
    """Losses per token of each row that was looked up, (rows,), NaN for others: by the base and by the adapter."""

    base: np.ndarray
    adapter: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """How much lower the adapter's loss is."""
        gain: np.ndarray = self.base - self.adapter
        return gain


@dataclass(frozen=True)
class RowsExplanation:
    """The life of each training row of a run, and the lists; `families` are ids of rows that nearly repeat each other.

    `scores` (rows,) are those of `score_wrong_answers`. `threshold` is the probability per token from which a row
    counts as learned, `is_own_median` whether it is that of the run's last visits. `measured` is None where base and
    adapter were not asked. `texts` gives what is read and what is learned of a row. `held_out` are the losses of the
    validation rows at each validation, the base's first.
    """

    run: str
    visits: RowVisits
    lives: RowLives
    threshold: float
    scores: np.ndarray
    lists: dict[str, tuple[ListedRow, ...]]
    families: tuple[tuple[str, ...], ...]
    measured: MeasuredLosses | None
    is_own_median: bool
    texts: Callable[[str], tuple[str, str]]
    held_out: RowVisits | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        return self.visits.ids

    @property
    def suspects(self) -> tuple[ListedRow, ...]:
        """The rows that are likely mislabelled, the most suspicious first."""
        return self.lists[WRONG]

    def kinds_of(self) -> dict[str, list[str]]:
        """The names of the lists that each listed row stands in."""
        found: dict[str, list[str]] = {}
        for name, rows in self.lists.items():
            for row in rows:
                found.setdefault(row.id, []).append(name)
        return found

    def as_json(self) -> dict[str, Any]:
        lives, count = self.lives, self.visits.losses.shape[0]
        return {
            "run": self.run,
            "rows": count,
            "recorded_every": self.visits.every,
            "visits": int(lives.visits.sum()),
            "most_visits": int(lives.visits.max(initial=0)),
            "learned_from": self.threshold,
            "learned_at_the_last_visit": int(lives.is_learned.sum()),
            "mean_probability": float(lives.confidence.mean()),
            "mean_variability": _mean_or_none(lives.variability),
            "base_loss": _mean_or_none(self.measured.base) if self.measured else None,
            "adapter_loss": _mean_or_none(self.measured.adapter) if self.measured else None,
            "held_out_rows": len(self.held_out.ids) if self.held_out else 0,
            "held_out_validations": self.held_out.losses.shape[1] if self.held_out else 0,
            "lists": {
                name: [{"id": row.id, "reason": row.reason} for row in rows] for name, rows in self.lists.items()
            },
            "families": [list(family) for family in self.families],
        }


def _mean_or_none(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


@dataclass(frozen=True)
class RowsOptions:
    """What is read and measured. `learned` is the probability per token from which a row counts as learned, None: see
    `choose_threshold`; `base` measures every row by base and adapter; `device` and `given` are those of `open_run`."""

    learned: float | None = None
    base: bool = False
    device: str | None = None
    given: Mapping[str, Any] | None = None


def explain_rows(
    run: RunFolder,
    options: RowsOptions | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], object] = lambda _: None,
) -> RowsExplanation:
    """The life of each training row of a run, which may still be training, from the losses that it recorded.

    Args:
        announce: called with the cost before anything is measured.

    Cost: reads the records and the tokens of the rows; with `base`, two forward passes over them.

    Raises:
        CheckpointError: the run recorded no losses of rows, its rows changed since, or (`base`) it is not finished.
        ConfigurationError: `learned` is no probability.
    """
    options, progress = options or RowsOptions(), progress or Progress()
    if options.learned is not None and not 0 < options.learned < 1:
        raise ConfigurationError(f"--learned {options.learned:g}: give a probability between 0 and 1.")
    visits = read_visits(run)
    announce(f"reads what the run recorded of {pluralize(len(visits.ids), 'training row')}; no model runs for it")
    rows, measured = open_rows_of(run, progress, options.given), None
    if options.base:
        tokens = 2 * int(rows.dataset.lengths.sum())
        announce(
            f"base and adapter: 2 forward passes over the {len(rows.dataset):,} rows, {format_count(tokens)} tokens"
        )
        measured = measure_rows(run, rows, visits.ids, progress, options)
    return explain_visits(run, visits, rows, options.learned, measured)


def explain_visits(
    run: RunFolder,
    visits: RowVisits,
    rows: TrainingRows,
    learned: float | None = None,
    measured: MeasuredLosses | None = None,
) -> RowsExplanation:
    """The lives of rows from their recorded visits. Cost: linear in visits, and in tokens to find near repeats.

    Args:
        learned: the probability per token from which a row counts as learned; None: see `choose_threshold`.
    """
    is_planted = np.array([row_id.startswith(f"{SOURCE}:") for row_id in visits.ids], dtype=bool)
    last = visits.losses[np.arange(len(visits.ids)), np.isfinite(visits.losses).sum(1) - 1]
    threshold = learned or choose_threshold(last)
    lives = describe_lives(visits.losses, threshold)
    scores = score_wrong_answers(visits.losses, visits.steps, visits.tokens)
    chosen = _choose_rows(lives, scores, ~is_planted)
    lists = {
        name: tuple(
            ListedRow(visits.ids[i], _describe_reason(name, i, visits, lives, scores), *rows.read_text(visits.ids[i]))
            for i in found
        )
        for name, found in chosen.items()
    }
    return RowsExplanation(
        str(run.root),
        visits,
        lives,
        threshold,
        scores,
        lists,
        find_families(rows),
        measured,
        learned is None and threshold != LEARNED,
        rows.read_text,
        read_held_out(run),
    )


def _choose_rows(lives: RowLives, scores: np.ndarray, allowed: np.ndarray) -> dict[str, list[int]]:
    """The positions of each list, those that stand out most first."""
    last = lives.visits - 1
    is_late = (lives.visits > 2) & (lives.first_learned == last)
    masks = {
        WRONG: (scores >= SUSPICIOUS, -scores),
        NEVER: ((lives.visits > 1) & (lives.first_learned < 0), -lives.last_loss),
        FORGOTTEN: ((lives.forgotten > 0) & ~lives.is_learned, -lives.last_loss),
        LATE: (is_late, -lives.first_loss),
    }
    return {
        name: [int(i) for i in np.argsort(order, kind="stable") if mask[i] and allowed[i]]
        for name, (mask, order) in masks.items()
    }


def _describe_reason(name: str, i: int, visits: RowVisits, lives: RowLives, scores: np.ndarray) -> str:
    losses = visits.losses[i][: lives.visits[i]]
    series = " → ".join(f"{loss:.2f}" for loss in losses[:4]) + (f" … {losses[-1]:.2f}" if len(losses) > 4 else "")
    series = f"{series} nats per token"
    if name == WRONG:
        return f"loss {series}: {scores[i]:.1f} robust deviations above what was usual then, among rows of like length"
    if name == FORGOTTEN:
        return f"loss {series}: learned, and not any more at its last visit; lost {lives.forgotten[i]} times"
    if name == LATE:
        return f"loss {series}: first learned at step {visits.steps[i][lives.first_learned[i]]}, its last visit"
    return f"loss {series}: learned at no visit"


def find_families(rows: TrainingRows) -> tuple[tuple[str, ...], ...]:
    """Ids of training rows that nearly repeat each other, largest families first; see `data.near_rows`."""
    pairs = find_near_repeats(rows.dataset)
    families: dict[int, list[str]] = {}
    ids = rows.dataset.ids if len(pairs) else []
    roots = find_components(len(ids), pairs)
    for place in np.unique(pairs).tolist():
        families.setdefault(int(roots[place]), []).append(ids[place])
    return tuple(tuple(family) for family in sorted(families.values(), key=len, reverse=True))


def measure_rows(
    run: RunFolder, rows: TrainingRows, ids: tuple[str, ...], progress: Progress, options: RowsOptions | None = None
) -> MeasuredLosses:
    """The losses of these rows by the base and by the finished adapter: two forward passes over them.

    Raises:
        CheckpointError, AdapterError: the run has no finished adapter, or it cannot be loaded.
    """
    options = options or RowsOptions()
    session = open_run(run, options.device, given=options.given, adapter=run.adapter)
    known = [i for i, row_id in enumerate(ids) if row_id in rows.places]
    dataset = rows.dataset.select(np.array([rows.places[ids[i]] for i in known], dtype=np.int64))
    found = np.full((2, len(ids)), np.nan)
    with progress.task("measuring rows by base and adapter", 2 * len(dataset), "rows") as advance:
        way = EvaluationOptions(Processes(session.device), session.precision, EVALUATED_TOKENS, session.pad_id, advance)
        with base_only(session.model):
            base = token_sums(session.model, dataset, way)
        adapter = token_sums(session.model, dataset, way)
    found[0, known], found[1, known] = base.nll / base.tokens, adapter.nll / adapter.tokens
    return MeasuredLosses(found[0], found[1])
