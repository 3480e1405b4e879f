"""What each service holds of a run, read by the service's own reader, in one form; and what it must hold."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from training_lens.integrations.record import RunRecord
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder

Shown = dict[str, dict[int, float]]  # metric -> step -> value


def expected(run: RunFolder) -> Shown:
    """Every due line of metrics.jsonl, by the names that all trackers use."""
    every = RunRecord(run).config.training.logging_steps
    shown: Shown = {}
    for line in read_metrics(run.metrics_file):
        if line["kind"] == "step" and (line["step"] == 1 or line["step"] % every == 0):
            values = {f"train/{name}": line[name] for name in ("loss", "grad_norm", "lr")}
        elif line["kind"] != "step":
            values = {"validation/loss": line["loss"]}
            values |= {f"validation/loss_{domain}": loss for domain, loss in line["by_domain"].items()}
        else:
            continue
        for name, value in values.items():
            shown.setdefault(name, {})[line["step"]] = value
    return shown


def once(pairs: list[tuple[int, float]]) -> dict[int, float]:
    """Steps and values, where no step comes twice."""
    found = dict(pairs)
    assert len(found) == len(pairs), f"a step comes twice: {sorted(step for step, _ in pairs)}"
    return found


def of_tensorboard(run: RunFolder, names: Shown) -> Shown:
    """Single precision, as TensorBoard keeps it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.logs), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {name: once([(event.step, event.value) for event in events.Scalars(name)]) for name in names}


def wandb_records(file: Path) -> list[dict[str, Any]]:
    """The records of a W&B file, by W&B's own reader."""
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--json", "--no-observability", "--run-file", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def of_wandb(folder: Path, names: Shown) -> Shown:
    """Of all offline runs in a folder together, which are one W&B run."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    rows = [r["history"]["item"] for file in files for r in wandb_records(file) if r["type"] == "history"]
    return {name: once([(row["step"], row[name]) for row in rows if name in row]) for name in names}


def mlflow_run(uri: str) -> tuple[Any, Any]:
    """The client of a database, and its only run."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return client, run


def of_mlflow(uri: str, names: Shown) -> Shown:
    client, run = mlflow_run(uri)
    return {name: once([(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]) for name in names}


def of_trackio(folder: Path, project: str, names: Shown) -> Shown:
    """Of the only run of a project; read in another process, for trackio reads its place once."""
    import os
    import sys

    code = (
        "import json, sys\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        "(run,) = SQLiteStorage.get_run_records(sys.argv[1])\n"
        "print(json.dumps(SQLiteStorage.get_logs(sys.argv[1], run['name'], run_id=run['id']), default=str))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, project]
    lines = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    return {name: once([(line["step"], line[name]) for line in lines if name in line]) for name in names}
