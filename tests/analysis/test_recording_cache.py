"""Pages of a run share what was read of its captures, and see new captures at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from training_lens.analysis.page import recording_cache
from training_lens.analysis.page.recording_cache import RecordingCache
from training_lens.runs.run_folder import RunFolder


def make_newer(path: Path) -> None:
    """The time of a file that was written again."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def test_a_recording_is_shared_until_captures_or_the_summary_are_written(finished_run: Any, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(finished_run.root, tmp_path / "run")))
    recordings = RecordingCache()
    first = recordings.open(run)
    make_newer(run.metrics_file)
    assert recordings.open(run) is first  # a run that trains logs all the time
    opened = [first]
    for path in (next(iter(sorted(run.lens.glob("*/")))), run.metadata / "summary.json"):
        make_newer(path)
        opened.append(recordings.open(run))
        assert opened[-1] is not opened[-2]


def test_logged_steps_are_read_when_a_recording_is_old(
    finished_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(Path(shutil.copytree(finished_run.root, tmp_path / "run")))
    recordings = RecordingCache()
    first = recordings.open(run)
    monkeypatch.setattr(recording_cache, "KEPT_SECONDS", 0.0)
    assert recordings.open(run) is first
    make_newer(run.metrics_file)
    assert recordings.open(run) is not first
