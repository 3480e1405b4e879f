"""What is known of a run's rows besides their tokens: the newest loss of each, and why it was listed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training_lens.errors import LensError
from training_lens.runs.run_folder import RunFolder
from training_lens.ui.data_splits import EXCLUDED, TRAIN, VALIDATION, RowSplit, find_listed_rows
from training_lens.utils.limits import RECORD_BYTES, load_bounded_json, read_bytes
from training_lens.utils.logging import get_logger

if TYPE_CHECKING:
    import pyarrow as pa

logger = get_logger(__name__)
REPORTS, SUSPECTS = "explain-rows*.json", "explain-rows-suspects.txt"
WRONG = "likely mislabelled"  # the list of `explain rows` that is also written as a file
LEFT_OUT = "excluded"
SUSPICIOUS = (WRONG, LEFT_OUT)
MOST_KINDS = 32  # lists of suspects, a bit each
FileState = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class RowMarks:
    """The marks of a split's rows, (rows,) each, and the files that they were read from.

    `losses` in nats per supervised token, NaN where none is known; the loss of one row in `every` was recorded.
    `kinds` has a bit for each of `kind_names`; `reasons` are positions in `reason_texts`, -1 for a row on no list.
    """

    losses: np.ndarray
    every: int
    kinds: np.ndarray
    kind_names: tuple[str, ...]
    reasons: np.ndarray
    reason_texts: tuple[str, ...]
    state: FileState

    def find_suspects(self, kind: str) -> np.ndarray:
        """Which rows are on a list, (rows,) bool; '1': on those of suspects and excluded rows, 'all': on any."""
        wanted = {"1": SUSPICIOUS, "all": self.kind_names}.get(kind, (kind,))
        bits = sum(1 << place for place, name in enumerate(self.kind_names) if name in wanted)
        found: np.ndarray = (self.kinds & np.uint32(bits)) != 0
        return found

    def count_kinds(self) -> dict[str, int]:
        """The rows on each list."""
        return {
            name: int(np.count_nonzero(self.kinds & np.uint32(1 << place)))
            for place, name in enumerate(self.kind_names)
        }

    def read_reason(self, index: int) -> str | None:
        """Why a row was listed."""
        place = int(self.reasons[index])
        return None if place < 0 else self.reason_texts[place]


def read_state(run: RunFolder) -> FileState:
    """The files that marks are read from, as they are now."""
    from training_lens.core.table_names import HELD_OUT_LOSSES, ROW_LOSSES

    places = [(run.lens / ROW_LOSSES, "*.parquet"), (run.lens / HELD_OUT_LOSSES, "*.parquet")]
    places += [(run.reports, REPORTS), (run.reports, SUSPECTS)]
    return tuple(item for folder, pattern in places for item in _stat_files(folder, pattern))


def _stat_files(folder: Path, pattern: str) -> Iterator[tuple[str, int, int]]:
    for path in sorted(folder.glob(pattern)):
        try:
            stat = path.stat()
        except OSError:  # merged into another one since it was listed
            continue
        yield str(path), stat.st_mtime_ns, stat.st_size


def read_row_marks(run: RunFolder, split: RowSplit, state: FileState) -> RowMarks:
    """The marks of a split's rows."""
    losses, every = read_newest_losses(run, split)
    lists = read_row_lists(run) if split.name == TRAIN else {}
    if split.name == EXCLUDED:
        lists = {LEFT_OUT: dict.fromkeys(split.ids.to_pylist(), "data.exclude left it out of this run")}
    kinds, reasons = np.zeros(len(split.dataset), np.uint32), np.full(len(split.dataset), -1)
    texts: list[str] = []
    for place, (name, listed) in enumerate(lists.items()):
        found = find_listed_rows(split.ids, list(listed))
        kinds[found >= 0] |= np.uint32(1 << place)
        reasons = np.where((reasons < 0) & (found >= 0), found + len(texts), reasons)
        texts += [f"{name}: {reason}" if reason else name for reason in listed.values()]
    return RowMarks(losses, every, kinds, tuple(lists), reasons, tuple(texts), state)


def read_newest_losses(run: RunFolder, split: RowSplit) -> tuple[np.ndarray, int]:
    """The loss of each row at its newest visit or validation, (rows,) float32, and one row in how many has one.

    NaN for a row that was not visited yet, or not recorded.
    """
    from training_lens.core.lens_store import LensStore
    from training_lens.core.table_names import HELD_OUT_LOSSES, ROW_LOSSES

    losses = np.full(len(split.dataset), np.nan, dtype=np.float32)
    name = {TRAIN: ROW_LOSSES, VALIDATION: HELD_OUT_LOSSES}.get(split.name)
    try:
        store = LensStore(run.lens)
        if name is None or name not in store.tables():
            return losses, 1
        table, every = store.table(name, ["loss"]), int(store.manifest.settings.get(f"{name}_every") or 1)
    except (LensError, OSError) as error:
        logger.debug("no losses of rows: %s", error)
        return losses, 1
    ids, newest = _keep_newest(table)
    found = find_listed_rows(split.ids, ids)
    losses[found >= 0] = newest[found[found >= 0]]
    return losses, every


def _keep_newest(table: pa.Table) -> tuple[pa.Array, np.ndarray]:
    """The row ids of a table that ascends by step, and the last loss of each."""
    from training_lens.core.arrow import MODULE

    column = table.unify_dictionaries().combine_chunks().column(MODULE).combine_chunks()
    ids = column.dictionary
    newest = np.full(len(ids), np.nan, dtype=np.float32)
    newest[column.indices.to_numpy()] = table.column("loss").to_numpy()  # of equal places, the last one stays
    return ids, newest


def read_row_lists(run: RunFolder) -> dict[str, dict[str, str]]:
    """The lists of `explain rows`, by name: each row's id and why it is there. A file that cannot be read is none."""
    lists: dict[str, dict[str, str]] = {WRONG: {}}
    for path in sorted(run.reports.glob(REPORTS)):
        for name, listed in _read_report_lists(path):
            if name in lists or len(lists) < MOST_KINDS:
                lists.setdefault(name, {}).update(listed)
    for row_id, reason in _read_suspects(run.reports / SUSPECTS):
        lists[WRONG].setdefault(row_id, reason)
    return {name: listed for name, listed in lists.items() if listed}


def _read_report_lists(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        values = load_bounded_json(read_bytes(path, RECORD_BYTES))
        for name, rows in dict(values["lists"]).items():
            yield str(name), {str(row["id"]): str(row["reason"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.debug("%s has no lists of rows: %s", path, error)


def _read_suspects(path: Path) -> Iterator[tuple[str, str]]:
    """The ids of the file that data.exclude reads, which the user may have shortened, each with its remark."""
    try:
        lines = read_bytes(path, RECORD_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        row_id, _, reason = line.partition("\t")
        if row_id.strip() and not row_id.startswith("#"):
            yield row_id.strip(), reason.strip()
