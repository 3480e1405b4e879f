"""Sweeps of very short trials: two steps of a tiny model on 24 rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage

from training_lens.config.compose import validate_values
from training_lens.config.schema import TrainingConfig
from training_lens.sweeps.runner import sweep_folder
from training_lens.sweeps.space import Space
from training_lens.sweeps.study import SharedStudy

ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(32)]


@pytest.fixture(autouse=True)
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the page and the collection of garbage, most of such a short sweep's time; `whole` keeps them."""
    if "whole" not in request.fixturenames:
        monkeypatch.setattr("training_lens.sweeps.sweep_report._build_figures", lambda *_: [])
        monkeypatch.setattr("training_lens.sweeps.sweep_report.write_page", lambda *_: None)
        monkeypatch.setattr("training_lens.sweeps.runner.free_memory", lambda: None)


@pytest.fixture
def whole() -> None:
    """A sweep with its page and all."""


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with Optuna's tables and no study, which takes a second to make."""
    path = tmp_path_factory.mktemp("database") / "study.db"
    storage = RDBStorage(f"sqlite:///{path}")
    storage.remove_session()
    storage.engine.dispose()
    return path


def put_database(database: Path, folder: Path) -> None:
    if not (folder / "study.db").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(database, folder / "study.db")


@pytest.fixture
def sweep_config(tmp_path: Path, tiny_base: Path, empty_database: Path) -> Callable[..., TrainingConfig]:
    """A sweep's config on 24 rows with 8 to validate; keywords go into its sweep section. Its database is there."""

    def build(training: dict[str, Any] | None = None, **sweep: Any) -> TrainingConfig:
        values = {
            "model": {"id": str(tiny_base)},
            "data": {"train": ROWS[:24], "validation": ROWS[24:]},
            "training": {"epochs": 1, "max_steps": 2, **(training or {})},
            "peft": {"r": 4},
            "lens": {"enabled": False},
            "tracking": {"tensorboard": False},
            "sweep": {"space": {"training.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, "trials": 4, **sweep},
            "output": {"base_output_dir": str(tmp_path / "outputs")},
        }
        config = validate_values(values)
        put_database(empty_database, sweep_folder(config))
        return config

    return build


@pytest.fixture
def open_study(tmp_path: Path, empty_database: Path) -> Iterator[Callable[..., SharedStudy]]:
    """Opens the study of a config as another process would; all are closed in the end."""
    opened: list[SharedStudy] = []

    def open_one(config: TrainingConfig, **rows: str) -> SharedStudy:
        put_database(empty_database, tmp_path)
        opened.append(SharedStudy(config, Space.from_config(config), tmp_path, rows))
        return opened[-1]

    yield open_one
    for study in opened:
        study.close()
