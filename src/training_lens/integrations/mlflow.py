"""MLflow: a local database beside the experiments, or a server.

MLflow has no histograms: see the run's folder, or another tracker.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from training_lens.errors import IntegrationError
from training_lens.integrations.record import flatten_settings
from training_lens.integrations.tracker import (
    ANSWER_COLUMNS,
    Record,
    Tracker,
    iterate_losses,
    list_answers,
    require_packages,
)
from training_lens.runs.metrics_log import read_metrics
from training_lens.utils.secrets import redact_text

PARAMS_PER_CALL, METRICS_PER_CALL = 100, 1000  # limits of a server
LONGEST_PARAM = 500  # characters, the limit of older servers; config.json has the full text
LONGEST_NAME = 250
STATUSES = {"finished": "FINISHED", "failed": "FAILED"}  # all others: KILLED
CLIENT = {  # the courier retries by itself; MLflow would for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class MlflowIntegration(Tracker):
    """Shows a run in MLflow, as one MLflow run however often it is resumed or sent again.

    It asks MLflow which values it has and sends the others, so that none is there twice, even after a lost answer.
    """

    name = "mlflow"

    def require(self) -> None:
        require_packages("mlflow", "mlflow", *(("alembic",) if self._is_local else ()))

    @property
    def uri(self) -> str:
        """The tracking server or database."""
        local = f"sqlite:///{self.run.base_output_dir / 'mlflow.db'}"
        return self.run.config.tracking.mlflow.uri or os.environ.get("MLFLOW_TRACKING_URI") or local

    @property
    def destination(self) -> str:
        return f"{self.uri} {self.run.config.tracking.mlflow.experiment or ''}"

    @property
    def _is_local(self) -> bool:
        return self.uri.startswith("sqlite:")

    def deliver(self, ended: bool) -> None:
        try:
            super().deliver(ended)
        except Exception as error:
            if isinstance(error.__context__, OSError) and not self._is_local:  # MLflow's own message has five lines
                why = type(error.__context__).__name__
                raise IntegrationError(f"the server {redact_text(self.uri)} cannot be reached ({why}).") from error
            raise

    def open(self) -> None:
        for name, value in CLIENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(self.uri)
        self._steps: dict[str, set[int]] = {}
        experiment = self._find_experiment()
        found = self._find_run(experiment) or self._client.create_run(experiment, run_name=self.run.run_id)
        self._id: str = found.info.run_id
        self._set_tags_and_params(found)
        self.cursor.save({**self.cursor.load(), "run": self._id})
        if self.run.status == "running":
            self._client.update_run(self._id, status="RUNNING")

    def log(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics: list[Metric] = []
        for record in records:
            for name, value in record.scalars.items():
                key = _safe_name(name)
                if key not in self._steps:  # the steps for which MLflow has this metric
                    self._steps[key] = {metric.step for metric in self._client.get_metric_history(self._id, key)}
                if record.step not in self._steps[key]:
                    metrics.append(Metric(key, value, now, record.step))
        for batch in _split_batches(metrics, METRICS_PER_CALL):
            self._client.log_batch(self._id, metrics=batch)
            for metric in batch:
                self._steps[metric.key].add(metric.step)
        for record in records:
            if record.verdict:
                self._client.set_tag(self._id, f"training_lens.{record.values['name']}.verdict", record.verdict)
        if any(record.kind == "samples" for record in records):
            lines = read_metrics(self.run.folder.samples_file)
            answers = [dict(zip(ANSWER_COLUMNS, row, strict=True)) for line in lines for row in list_answers(line)]
            self._log_table("samples.json", answers)

    def end(self) -> None:
        from mlflow.entities import Metric

        folder, now, step = self.run.folder, round(time.time() * 1000), self.run.summary.get("steps", 0)
        shown = self._client.get_run(self._id).data.metrics
        new = [Metric(key, value, now, step) for key, value in self.run.totals.items() if shown.get(key) != value]
        if new:
            self._client.log_batch(self._id, metrics=new)
        if folder.metrics_file.exists():
            self._log_table("validation.json", _validation_rows(read_metrics(folder.metrics_file)))
        if adapter := self.run.intact_adapter:
            self._client.log_artifacts(self._id, str(adapter), "adapter")
        for file in (folder.reports / "lens.html", folder.metadata / "config.json"):
            if file.exists():
                self._client.log_artifact(self._id, str(file))
        self._client.set_terminated(self._id, STATUSES.get(self.run.status, "KILLED"))

    def _find_experiment(self) -> str:
        """The id of the experiment, which is created if necessary, and refused if it was deleted."""
        name = self.run.config.tracking.mlflow.experiment or self.run.experiment
        found = self._client.get_experiment_by_name(name) or self._create_experiment(name)
        if found.lifecycle_stage != "active":
            raise IntegrationError(
                f"the experiment '{name}' was deleted in MLflow. Restore it (mlflow experiments restore "
                f"--experiment-id {found.experiment_id}), or name another with tracking.mlflow.experiment.",
                lasting=True,
            )
        return str(found.experiment_id)

    def _create_experiment(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        # A server has its own place for artifacts; a local database would put them into the current folder.
        place = (self.run.base_output_dir / "mlartifacts").as_uri() if self._is_local else None
        try:
            return self._client.get_experiment(self._client.create_experiment(name, artifact_location=place))
        except MlflowException:
            if made := self._client.get_experiment_by_name(name):  # another run has just created it
                return made
            raise

    def _find_run(self, experiment: str) -> Any | None:
        """The run in MLflow, by the id in the cursor or by our tag; None if there is none, or it was deleted.

        The tag finds a run whose process died right after creating it.
        """
        known_id = self.cursor.load().get("run")
        conditions = [f"attributes.run_id = '{known_id}'"] if known_id else []
        for condition in (*conditions, f"tags.`training_lens.identity` = '{self.run.identity}'"):
            if runs := self._client.search_runs([experiment], condition, max_results=1):
                return runs[0]
        return None

    def _set_tags_and_params(self, found: Any) -> None:
        """Set the run's tags, and its settings as parameters, without `output` and `tracking`, which may change."""
        from mlflow.entities import Param, RunTag

        tags = {
            "training_lens.identity": self.run.identity,
            "training_lens.run_id": self.run.run_id,
            "training_lens.experiment": self.run.experiment,
            **({"training_lens.sweep": self.run.sweep} if self.run.sweep else {}),
        }
        self._client.log_batch(self._id, tags=[RunTag(key, value) for key, value in tags.items()])
        params = [
            Param(_safe_name(key), str(value)[:LONGEST_PARAM])
            for key, value in flatten_settings(self.run).items()
            if not key.startswith(("output.", "tracking.")) and _safe_name(key) not in found.data.params
        ]
        for batch in _split_batches(params, PARAMS_PER_CALL):
            self._client.log_batch(self._id, params=batch)

    def _log_table(self, path: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write and register a table. MLflow's own `log_table` would append to one that is sent again."""
        if not rows:
            return
        table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
        self._client.log_text(self._id, json.dumps(table), path)
        listed = json.loads(self._client.get_run(self._id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        if (entry := {"path": path, "type": "table"}) not in listed:
            self._client.set_tag(self._id, "mlflow.loggedArtifacts", json.dumps([*listed, entry]))


def _safe_name(name: str) -> str:
    """A valid name for MLflow: letters, digits, `_-.: /`, no `.` parts; changed names get a unique suffix."""
    parts = [re.sub(r"[^\w\-. :]", "_", part) for part in name.split("/")]
    safe = "/".join(part if part.strip(".") else "_" for part in parts)
    if safe == name and len(name) <= LONGEST_NAME:
        return name
    tail = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{safe[: LONGEST_NAME - 7]}_{tail}"


def _split_batches(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + most] for start in range(0, len(items), most))


def _validation_rows(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per loss of each validation, in nats per supervised token."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        if line.get("kind") in ("base", "validation"):
            losses = {f"{kind} {name}".strip(): loss for kind, name, loss in iterate_losses(line)}
            rows += [{"step": line["step"], "of": of, "loss": loss} for of, loss in losses.items()]
    return rows
