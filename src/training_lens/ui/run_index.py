"""The list of runs: a row for each, read again only where its files changed."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from training_lens.analysis.page.run_row import RunRow, read_run_row
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_lookup import find_run_folders

SECONDS_OF_A_REQUEST = 0.35  # for reading runs; the rest comes with the next request
FIRST_SECONDS = 0.1  # of the first request: a page waits for it
WATCHED = ("metadata/summary.json", "metadata/tags.json", "reports", "logs/metrics.jsonl", "logs/findings.jsonl")
RunKey = tuple[str, str]  # experiment and run id


@dataclass
class RunIndex:
    """The rows of all runs in a folder, each with the version of the list at which it was read last."""

    folder: Path
    name: str = field(default_factory=lambda: secrets.token_hex(4))  # versions of another index mean nothing here
    version: int = 0
    rows: dict[RunKey, RunRow] = field(default_factory=dict)
    _versions: dict[RunKey, int] = field(default_factory=dict)  # of rows, and of those that were removed
    _stamps: dict[RunKey, tuple[int, ...]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def read_changes(self, since: int, seconds: float | None = None) -> dict[str, Any]:
        """What changed after version `since`, as JSON values, after reading changed runs for some time.

        `pending` runs were not read yet, the oldest: they come with later calls.
        """
        with self._lock:
            usual = SECONDS_OF_A_REQUEST if self.rows else FIRST_SECONDS
            pending = self._refresh(time.monotonic() + (usual if seconds is None else seconds))
            changed = [key for key, version in self._versions.items() if version > since]
            return {
                "index": self.name,
                "version": self.version,
                "pending": pending,
                "total": len(self.rows) + pending,
                "changed": [dict(vars(self.rows[key])) for key in changed if key in self.rows],
                "removed": [list(key) for key in changed if key not in self.rows],
            }

    def _refresh(self, until: float) -> int:
        """Read the newest of new and changed runs until then, at least one; how many are left."""
        found = {(run.experiment_name, run.run_id): run for run in find_run_folders(str(self.folder))}
        for key in [key for key in self.rows if key not in found]:
            del self.rows[key], self._stamps[key]
            self._mark(key)
        stamps = {key: _stamp_files(run) for key, run in found.items()}
        stale = [key for key, stamp in stamps.items() if stamp != self._stamps.get(key) or self._may_change(key)]
        stale.sort(key=lambda key: key[1], reverse=True)
        for done, key in enumerate(stale):
            if done and time.monotonic() > until and key not in self.rows:
                return sum(other not in self.rows for other in stale[done:])
            row = read_run_row(found[key])
            self._stamps[key] = stamps[key]
            if row != self.rows.get(key):
                self.rows[key] = row
                self._mark(key)
        return 0

    def _may_change(self, key: RunKey) -> bool:
        """Whether a run may end without a file that changes: its process dies."""
        return key in self.rows and self.rows[key].status == "running"

    def _mark(self, key: RunKey) -> None:
        self.version += 1
        self._versions[key] = self.version


def _stamp_files(run: RunFolder) -> tuple[int, ...]:
    """Times and sizes of the files that a row is read from."""
    stamps = []
    for name in WATCHED:
        try:
            status = os.stat(f"{run.root}/{name}")  # noqa: PTH116  # pathlib takes three times as long, for 25,000 files
            stamps += [status.st_mtime_ns, status.st_size]
        except OSError:
            stamps += [0, 0]
    return tuple(stamps)
