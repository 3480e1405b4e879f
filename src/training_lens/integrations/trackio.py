"""trackio: a local database with a dashboard like that of W&B.

We write to its storage directly: `trackio.init` would start threads and samplers, print to standard output, and lose
what it cannot write.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training_lens.errors import IntegrationError
from training_lens.integrations.record import flatten_settings
from training_lens.integrations.tracker import Record, Tracker, bin_edges, iterate_histograms, require_packages
from training_lens.utils.names import expand_home


class TrackioIntegration(Tracker):
    """Shows a run in trackio: its metrics, samples, histograms and summary.

    Each line has its own id, by which trackio skips those that it has.
    """

    name = "trackio"

    def require(self) -> None:
        require_packages("trackio", "trackio")

    @property
    def database_folder(self) -> Path:
        """The folder of trackio's databases, one per project: `TRACKIO_DIR=FOLDER trackio show` shows them."""
        given = self.run.config.tracking.trackio.folder
        return expand_home(given).resolve() if given else self.run.base_output_dir / "trackio"

    @property
    def project(self) -> str:
        return self.run.config.tracking.trackio.project or self.run.experiment

    @property
    def destination(self) -> str:
        return f"{self.database_folder}:{self.project}"

    def open(self) -> None:
        self._storage: Any = self._open_storage()
        self._id: str = self.run.identity
        before = self._storage.get_run_config(self.project, run_id=self._id) or {}
        created = before.get("_Created") or datetime.now(UTC).isoformat()
        self._config = {**flatten_settings(self.run), "_Created": created, "_Group": self.run.sweep}

    def log(self, records: Sequence[Record]) -> None:
        shown = [(f"{record.kind}-{record.step}", record.step, _build_values(record)) for record in records]
        self._write_lines([line for line in shown if line[2]])

    def end(self) -> None:
        from trackio import Markdown

        summary, step = self.run.summary, int(self.run.summary.get("steps", 0))
        text = "\n".join(f"- {key}: {value}" for key, value in {**summary, "status": self.run.status}.items())
        self._write_lines(
            [(f"end-{step}-{self.run.status}", step, {**self.run.totals, "summary": Markdown(text)._to_dict()})]
        )

    def _open_storage(self) -> Any:
        """trackio's storage in our folder, which trackio reads from the environment when it is imported."""
        os.environ["TRACKIO_DIR"] = str(self.database_folder)
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import TRACKIO_DIR

        if self.database_folder != TRACKIO_DIR:
            raise IntegrationError(
                f"this process uses trackio in {TRACKIO_DIR} already; {self.database_folder} needs one of its own.",
                lasting=True,
            )
        try:
            SQLiteStorage.validate_project_name(self.project)
        except ValueError as error:
            raise IntegrationError(f"{error} Name it with tracking.trackio.project.", lasting=True) from error
        return SQLiteStorage

    def _write_lines(self, lines: Sequence[tuple[str, int, Mapping[str, Any]]]) -> None:
        """Write lines of (id, step, values); those whose id is there stay unchanged."""
        self._storage.bulk_log(
            self.project,
            self.run.run_id,
            [dict(values) for _, _, values in lines],
            steps=[step for _, step, _ in lines],
            log_ids=[f"{self._id}-{line}" for line, _, _ in lines],
            config=self._config,
            run_id=self._id,
        )


def _build_values(record: Record) -> Mapping[str, Any]:
    """The trackio values of a record."""
    from trackio import Histogram, Markdown, Table

    if record.kind == "samples":
        return {"samples": {"_type": Table.TYPE, "_value": [dict(row) for row in record.values["samples"]]}}
    if record.kind == "histograms":
        return {
            f"{kind}/{module}": Histogram(np_histogram=(bins["counts"], bin_edges(bins)))._to_dict()
            for kind, module, bins in iterate_histograms(record)
        }
    if record.verdict:
        return {**record.scalars, f"{record.values['name']}/verdict": Markdown(record.verdict)._to_dict()}
    return record.scalars
