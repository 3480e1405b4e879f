"""The recorded losses of training rows, by row and visit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from training_lens.core.arrow import MODULE, STEP
from training_lens.core.lens_store import LensStore
from training_lens.core.table_names import HELD_OUT_LOSSES, ROW_LOSSES
from training_lens.errors import CheckpointError, LensError
from training_lens.runs.run_folder import RunFolder


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
