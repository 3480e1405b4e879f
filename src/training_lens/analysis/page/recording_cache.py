"""What the lens captured of the runs that pages show, opened once."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING

from training_lens.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from training_lens.core.recording import Recording

MOST_RECORDINGS = 4


class RecordingCache:
    """The recordings of the runs that pages show; a run's is opened again when its files changed."""

    def __init__(self) -> None:
        self._recordings: OrderedDict[str, tuple[tuple[int, ...], Recording]] = OrderedDict()
        self._lock = Lock()

    def open(self, run: RunFolder) -> Recording:
        """The recording of a run.

        Raises:
            LensError: nothing was captured.
        """
        stamp, key = _stamp_captures(run), str(run.root)
        with self._lock:
            known = self._recordings.get(key)
            if known is None or known[0] != stamp:
                from training_lens.analysis.open_recording import open_recording  # imports torch

                known = (stamp, open_recording(run.root))
                self._recordings[key] = known
            self._recordings.move_to_end(key)
            while len(self._recordings) > MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        return known[1]


def _stamp_captures(run: RunFolder) -> tuple[int, ...]:
    """The times at which the tables, the summary and the comparison were last written."""
    folders = sorted(run.lens.glob("*/")) if run.lens.is_dir() else []
    files = [run.metadata / "summary.json", run.reports / "compare.json", run.metrics_file]
    return tuple(path.stat().st_mtime_ns for path in (*folders, *files) if path.exists())
