"""What the tests of integrations share."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens.runs.run_folder import RunFolder


@pytest.fixture
def couriers_of() -> Callable[[int], list[int]]:
    """The couriers that a process started: their process ids."""

    def found(pid: int | None = None) -> list[int]:
        files = Path(f"/proc/{pid or os.getpid()}/task").glob("*/children")
        children = [int(child) for file in files for child in file.read_text().split()]
        return [child for child in children if b"courier" in Path(f"/proc/{child}/cmdline").read_bytes()]

    return found


SAMPLES = [
    {"step": step, "base": not step, "samples": [{"id": "a:1", "prompt": "Who?", "expected": "I", "generated": word}]}
    for step, word in ((0, "he"), (6, "I"))
]


BINS = {"counts": [1, 5, 2], "low": -0.5, "high": 1.0}


HISTOGRAMS = [{"step": 6, "histograms": {"weights": {"model.q_proj.A": BINS}, "gradients": {"model.q_proj.A": BINS}}}]


@pytest.fixture(scope="session")
def sent_run(few_rows: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A short run that the courier sent to MLflow and trackio, both local; for reading alone."""
    from training_lens import TrainingConfig, TrainingWrapper

    values = {
        "data": {"train": few_rows["train"], "max_examples": 48, "val_ratio": 0.2},
        "training": {"epochs": 1, "batch_size": 8, "lr": 3e-3, "logging_steps": 2},
        "peft": {"r": 4},
        "tracking": {
            "tensorboard": False, "samples": 0, "histograms_every": None, "wait_seconds": 120,
            "mlflow": {"enabled": True}, "trackio": {"enabled": True},
        },
        "output": {"base_output_dir": str(tmp_path_factory.mktemp("outputs"))},
    }  # fmt: skip
    return RunFolder(Path(TrainingWrapper(TrainingConfig.model_validate(values)).train().run_dir))


@pytest.fixture(scope="session")
def lens_run(few_rows: dict[str, list[str]], tiny_base: Path, make_once: Callable[..., Path]) -> RunFolder:
    """A short run of a tiny model with its lens and its report, sent nowhere; for reading alone."""
    from training_lens import TrainingConfig, TrainingWrapper

    def make(folder: Path) -> None:
        values = {
            "model": {"id": str(tiny_base)},
            "data": {"max_examples": 48, **few_rows},
            "training": {"epochs": 1, "batch_size": 8, "lr": 3e-3, "logging_steps": 2},
            "peft": {"r": 4},
            "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None},
            "output": {"base_output_dir": str(folder)},
        }
        TrainingWrapper(TrainingConfig.model_validate(values)).train()

    (root,) = make_once("lens_run", make).glob("experiments/default/runs/*")
    return RunFolder(root)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow without runs, which takes a second to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # MLflow's own use of SQLAlchemy, as it is imported
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def unsent_run(lens_run: RunFolder, empty_mlflow: Path, tmp_path: Path) -> RunFolder:
    """A copy of it, with samples and histograms, sent nowhere yet."""
    place = tmp_path / "outputs" / "experiments" / "again" / "runs" / lens_run.run_id
    shutil.copytree(lens_run.root, place)
    shutil.copyfile(empty_mlflow, tmp_path / "outputs" / "mlflow.db")
    run = RunFolder(place)
    for path, lines in ((run.samples_file, SAMPLES), (run.histograms_file, HISTOGRAMS)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def cut_short() -> Callable[[RunFolder, int], Callable[[], None]]:
    """Makes of a run what it was when it was killed after a step; gives what brings the rest."""

    def cut(run: RunFolder, step: int) -> Callable[[], None]:
        paths = (run.metrics_file, run.samples_file, run.histograms_file, run.metadata / "summary.json")
        whole: dict[Path, str] = {path: path.read_text() for path in paths}

        def up_to_step(text: str) -> str:
            return "".join(line + "\n" for line in text.splitlines() if json.loads(line)["step"] <= step)

        for path in paths[:-1]:
            path.write_text(up_to_step(whole[path]))
        paths[-1].write_text(json.dumps({"status": "interrupted", "steps": step}))

        def go_on() -> None:
            for path, text in whole.items():
                path.unlink()  # a resume puts another file in its place
                path.write_text(text)

        return go_on

    return cut


def due(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """What every tracker must show: of each metric the steps and values, from metrics.jsonl alone."""
    shown: dict[str, list[tuple[int, float]]] = {}

    def add(name: str, line: dict[str, Any], value: float) -> None:
        shown.setdefault(name, []).append((line["step"], value))

    for line in map(json.loads, run.metrics_file.read_text().splitlines()):
        if line["kind"] == "step" and (line["step"] == 1 or line["step"] % 2 == 0):
            for name in ("loss", "grad_norm", "lr", "epoch"):
                add(f"train/{name}", line, line[name])
            add("train/tokens_per_second", line, line["tokens"] / line["seconds"])
        elif line["kind"] != "step":
            add("validation/loss", line, line["loss"])
            for domain, loss in line["by_domain"].items():
                add(f"validation/loss_{domain}", line, loss)
            for file, loss in line["by_file"].items():
                add(f"validation_files/loss_{Path(file).name}", line, loss)
    return shown
