"""What the lens captured of the runs that pages show, opened once."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from training_lens.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from training_lens.core.recording import Recording

MOST_RECORDINGS = 4
KEPT_SECONDS = 10.0  # while only the log of steps grows, which it does all the time in training


@dataclass(frozen=True)
class _OpenRecording:
    recording: Recording
    stamp: tuple[int, ...]
    logged: int
    opened: float

    def is_current(self, stamp: tuple[int, ...], logged: int) -> bool:
        is_fresh = time.monotonic() - self.opened < KEPT_SECONDS
        return self.stamp == stamp and (self.logged == logged or is_fresh)


class RecordingCache:
    """The recordings of the runs that pages show; a run's is opened again when its files changed.

    Several pages of a run that trains share one recording, which may lack the steps of the last `KEPT_SECONDS`.
    """

    def __init__(self) -> None:
        self._recordings: OrderedDict[str, _OpenRecording] = OrderedDict()
        self._lock = Lock()

    def open(self, run: RunFolder) -> Recording:
        """The recording of a run.

        Raises:
            LensError: nothing was captured.
        """
        stamp, logged, key = _stamp_captures(run), _read_time(run.metrics_file), str(run.root)
        with self._lock:
            known = self._recordings.get(key)
            if known is None or not known.is_current(stamp, logged):
                from training_lens.analysis.open_recording import open_recording  # imports torch

                known = _OpenRecording(open_recording(run.root), stamp, logged, time.monotonic())
                self._recordings[key] = known
            self._recordings.move_to_end(key)
            while len(self._recordings) > MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        return known.recording


def _stamp_captures(run: RunFolder) -> tuple[int, ...]:
    """The times at which the tables, the summary and the comparison were last written."""
    folders = sorted(run.lens.glob("*/")) if run.lens.is_dir() else []
    return tuple(map(_read_time, (*folders, run.metadata / "summary.json", run.reports / "compare.json")))


def _read_time(path: Path) -> int:
    """When a file was last written; 0 if there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0
