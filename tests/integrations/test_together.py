"""All integrations of one run at once: each holds what the run holds, and no trouble of theirs changes a bit of it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reading_back
from hub_server import Hub
from s3_server import Server

from training_lens import TrainingWrapper
from training_lens.config.compose import compose, validate_values
from training_lens.integrations.mirror_manifest import RemoteRun
from training_lens.integrations.send_run import read_delivery_states, send_run
from training_lens.integrations.storage import open_storage
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback
from training_lens.utils.files import hash_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's use of SQLAlchemy
WEIGHTS = "adapter_model.safetensors"
PLACE, REPO = "s3://bucket/path", "me/together"
EVERYWHERE = {
    "tracking": {
        "wandb": {"mode": "offline"},
        "mlflow": {"enabled": True},
        "trackio": {"enabled": True},
        "hub": {"repo": REPO, "checkpoints": True},
        "wait_seconds": 240,
    },
    "output": {"mirror": PLACE, "run_id": "run"},
}
NOWHERE = {"tracking": {"tensorboard": False, "samples": 0, "histograms_every": None}}
SMALL = {
    "data": {"max_examples": 48, "validation": None, "val_ratio": 0.2},
    "training": {"epochs": 4, "batch_size": 8, "lr": 3e-3, "logging_steps": 2},
    "peft": {"r": 4, "lora_dropout": 0.1},
    "lens": {"report": False},
}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def trained(values: dict[str, Any], folder: Path, *more: dict[str, Any], callbacks: Any = ()) -> RunFolder:
    from training_lens.utils.nested import merge_sections

    for extra in (*more, {"output": {"base_output_dir": str(folder)}}):
        values = merge_sections(values, extra)
    return RunFolder(Path(TrainingWrapper(validate_values(values), callbacks=callbacks).train().run_dir))


def check_everything(run: RunFolder, hub: Hub, folder: Path, *, mlflow: str = "") -> None:
    """Every service holds every due line once, and the adapter."""
    base, here = run.root.parents[3], hash_file(run.adapter / WEIGHTS)
    uri, names = mlflow or f"sqlite:///{base / 'mlflow.db'}", reading_back.expected(run)
    for found in (
        reading_back.of_wandb(run.tracking / "wandb", names),
        reading_back.of_mlflow(uri, names),
        reading_back.of_trackio(base / "trackio", "default", names),
    ):
        assert found == names
    of_tensorboard = reading_back.of_tensorboard(run, names)
    assert {name: pytest.approx(steps, rel=1e-6) for name, steps in of_tensorboard.items()} == names
    client, there = reading_back.mlflow_run(uri)
    assert hash_file(Path(client.download_artifacts(there.info.run_id, f"adapter/{WEIGHTS}", str(folder)))) == here
    (folder / "pushed").write_bytes(hub.files(REPO)[WEIGHTS])
    assert hash_file(folder / "pushed") == here
    remote = RemoteRun(open_storage(PLACE), "experiments/default/runs/run")
    for name in ("logs/metrics.jsonl", f"artifacts/adapter/{WEIGHTS}"):
        remote.storage.get_file(remote.storage_name(name), folder / "back")
        assert hash_file(folder / "back") == hash_file(run.root / name)


@pytest.mark.slow
def test_every_place_holds_what_the_run_holds(s3: Server, hub: Hub, tmp_path: Path) -> None:
    run = trained(SMALL, tmp_path / "outputs", EVERYWHERE)
    assert {state.name: state.status for state in read_delivery_states(run)} == dict.fromkeys(
        ("tensorboard", "wandb", "mlflow", "trackio", "mirror", "hub"), "delivered"
    )
    check_everything(run, hub, tmp_path)
    plain = trained(SMALL, tmp_path / "plain", NOWHERE)
    assert hash_file(run.adapter / WEIGHTS) == hash_file(plain.adapter / WEIGHTS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_is_everywhere(s3: Server, hub: Hub, tmp_path: Path) -> None:
    values = compose(None, ["+experiment=default"]).model_dump()
    check_everything(trained(values, tmp_path / "outputs", EVERYWHERE), hub, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_gsm8k_is_everywhere(s3: Server, hub: Hub, tmp_path: Path, shared: Path) -> None:
    values = {
        "model": {"id": str(shared / "models/tinystories-656k"), "seq_len": 256},
        "data": {"train": [str(shared / "data/gsm8k/train.jsonl")], "val_ratio": 0.01, "max_examples": 1000},
        "training": {"epochs": 1, "batch_size": 8, "eval_steps": 50},
    }
    check_everything(trained(values, tmp_path / "outputs", EVERYWHERE), hub, tmp_path)


class Trouble(Callback):
    """At one step all goes wrong at once: the S3 server dies for ten seconds, W&B's process is killed."""

    def __init__(self, s3: Server, step: int) -> None:
        self._s3, self._step = s3, step

    def on_step_end(self, trainer: Any, report: Any) -> None:
        time.sleep(0.2)  # so that the courier is under way, and ten seconds pass while it trains
        if report.step == self._step:
            self._s3.kill()
            threading.Timer(10.0, self._s3.start).start()
            subprocess.run(["pkill", "-KILL", "-f", "wandb-core"], check=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A disk that is full at once, and what makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True) and None
    subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_trouble_at_once_changes_no_bit_and_sync_completes_it(
    s3: Server, hub: Hub, small_disk: tuple[Path, Callable[[], None]], tmp_path: Path
) -> None:
    disk, enlarge = small_disk
    hub.order({"on": "POST", "status": 500, "times": 3}, {"on": "POST", "status": 429, "times": 3})
    long = {"training": {**SMALL["training"], "epochs": 16}}
    database = {"tracking": {"mlflow": {"enabled": True, "uri": f"sqlite:///{disk / 'mlflow.db'}"}}}
    trouble = Trouble(s3, step=30)
    run = trained(SMALL, tmp_path / "outputs", long, EVERYWHERE, database, callbacks=(trouble,))
    plain = trained(SMALL, tmp_path / "plain", long, NOWHERE)
    assert hash_file(run.adapter / WEIGHTS) == hash_file(plain.adapter / WEIGHTS)
    left = {state.name for state in read_delivery_states(run) if state.status != "delivered"}
    assert "mlflow" in left, "its disk was full"
    enlarge()
    assert {state.status for state in send_run(run)} == {"delivered"}
    check_everything(run, hub, tmp_path, mlflow=database["tracking"]["mlflow"]["uri"])
