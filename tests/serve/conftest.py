"""Runs of a tiny model, and servers of them that end with their module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_server import PEFT, Server

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.inference.session import Session, open_session


@pytest.fixture(scope="session")
def outputs(make_once: Callable[..., Path], tiny_base: Path, few_rows: dict[str, list[str]]) -> Path:
    """A folder of runs on one tiny base, an experiment for each kind of adapter."""

    def train_all(folder: Path) -> None:
        for name, peft in PEFT.items():
            values = {
                "model": {"id": str(tiny_base)},
                "data": {**few_rows, "max_examples": 24, "template": "alpaca"},
                "training": {"epochs": 1, "batch_size": 8, "lr": 5e-2, "seed": len(name)},
                "peft": {"r": 4, **peft},
                "lens": {"enabled": False},
                "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None},
                "output": {"base_output_dir": str(folder), "experiment_name": name},
            }
            TrainingWrapper(TrainingConfig.model_validate(values)).train()

    return make_once("served", train_all)


@pytest.fixture(scope="session")
def sessions(outputs: Path) -> dict[str, Session]:
    """What `infer` answers with, by experiment."""
    output = {"base_output_dir": str(outputs)}
    return {
        name: open_session(TrainingConfig.model_validate({"inference": {"adapter": name}, "output": output}))
        for name in PEFT
    }


@pytest.fixture(scope="module")
def start_server(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers, which end with the module: `start_server("lora", "--rows", "2")`."""
    started: list[Server] = []

    def start(*arguments: str) -> Server:
        folder = tmp_path_factory.mktemp("server") / "here"
        started.append(Server(folder, *arguments, f"output.base_output_dir={outputs}"))
        return started[-1]

    yield start
    for server in started:
        server.stop()
