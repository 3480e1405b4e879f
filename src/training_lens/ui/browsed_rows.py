"""The rows of the runs that the Data page shows, with what was read and found of them last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from training_lens.runs.run_folder import RunFolder
from training_lens.ui.data_splits import RowSplit, RunRows
from training_lens.ui.row_filters import FoundRows, RowFilters, Sort, filter_columns, search_text, sort_rows
from training_lens.ui.row_marks import RowMarks, read_row_marks, read_state

MOST_RUNS = 2  # that stay open; a run of 1,000,000 rows takes about 150 MB
KEPT_SEARCHES = 8  # of a run, so that the next page searches nothing again


class BrowsedRows(RunRows):
    """The splits of one run, with the marks of their rows and the last searches."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(run)
        self._marks: dict[str, RowMarks] = {}
        self._search_lock = threading.Lock()
        self._searches: OrderedDict[object, FoundRows] = OrderedDict()

    def read_marks(self, split: RowSplit) -> RowMarks:
        """What is known of the split's rows now: a run that trains adds losses."""
        with self.lock:
            state = read_state(self.run)
            if split.name not in self._marks or self._marks[split.name].state != state:
                self._marks[split.name] = read_row_marks(self.run, split, state)
            return self._marks[split.name]

    def find_rows(self, split: RowSplit, filters: RowFilters, sort: Sort) -> FoundRows:
        """The rows that pass the filters, sorted."""
        marks = self.read_marks(split)
        positions = sort_rows(np.flatnonzero(filter_columns(split, marks, filters)), split, marks, sort)
        if filters.text is None:
            return FoundRows(positions)
        key = (split.name, filters, sort, marks.state)
        with self._search_lock:  # one search of a run at a time
            found = self._searches.pop(key, None) or search_text(self, split, positions, filters.text)
            self._searches[key] = found
            while len(self._searches) > KEPT_SEARCHES:
                self._searches.popitem(last=False)
            return found


class OpenedRuns:
    """The runs whose rows were used most recently, at most `most` of them."""

    def __init__(self, most: int = MOST_RUNS) -> None:
        self._most, self._lock = most, threading.Lock()
        self._runs: OrderedDict[Path, tuple[object, BrowsedRows]] = OrderedDict()

    def open_run(self, run: RunFolder) -> BrowsedRows:
        """The rows of a run; opened anew if another run has its place now."""
        stat = (run.metadata / "data.json").stat()
        written = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        with self._lock:
            known = self._runs.get(run.root)
            if known is None or known[0] != written:
                self._runs[run.root] = (written, BrowsedRows(run))
            self._runs.move_to_end(run.root)
            while len(self._runs) > self._most:
                self._runs.popitem(last=False)
            return self._runs[run.root][1]
