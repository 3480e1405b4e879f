"""A mirror on a real server that speaks S3: killed, empty after a restart, gone; the run does not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from s3_server import Server, until

from training_lens import TrainingWrapper
from training_lens.errors import IntegrationError
from training_lens.integrations.mirror_manifest import RemoteRun
from training_lens.integrations.remote_run import fetch_to_resume, list_remote_runs
from training_lens.integrations.send_run import read_delivery_states, send_run
from training_lens.integrations.storage import open_storage
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback
from training_lens.utils.files import hash_file

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
PLACE = "s3://bucket/path"
SECRET = "planted-secret-access-key"
ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(48)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in server.environment.items():
            patched.setenv(name, value)
        yield server
    server.kill()


@pytest.fixture
def s3(server: Server) -> Server:
    """The server, with an empty bucket."""
    server.start()
    return server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter's sha256 of a run that goes nowhere."""
    from training_lens.config.compose import validate_values

    config = validate_values(values(str(tmp_path_factory.mktemp("plain"))))
    return adapter_of(RunFolder(Path(TrainingWrapper(config).train().run_dir)))


def values(base: str, **tracking: Any) -> dict[str, Any]:
    return {
        "data": {"train": ROWS},
        "training": {"epochs": 1, "batch_size": 8, "lr": 3e-3, "save_steps": 2},
        "peft": {"r": 4},
        "lens": {"enabled": False},
        "tracking": {"tensorboard": False, "samples": 0, "send_seconds": 0.2, **tracking},
        "output": {"base_output_dir": base},
    }


def mirrored(base: Path, **tracking: Any) -> Any:
    from training_lens.config.compose import validate_values

    config = values(str(base), **tracking)
    config["output"] |= {"mirror": PLACE, "run_id": "run"}
    return validate_values(config)


def adapter_of(run: RunFolder) -> str:
    return hash_file(run.adapter / "adapter_model.safetensors")


def remote() -> RemoteRun:
    return RemoteRun(open_storage(PLACE), "experiments/default/runs/run")


def check_read_back(run: RunFolder, folder: Path) -> None:
    """All that is there is what is here, by sha256; and no secret is in it."""
    there = remote()
    manifest = there.read_manifest()
    assert set(there.list_files()) == set(manifest.files) and manifest.status == run.status
    assert any(name.startswith("checkpoints/") for name in manifest.files)
    for name, content in manifest.files.items():
        there.storage.get_file(there.storage_name(name), folder / "back")
        assert SECRET.encode() not in (folder / "back").read_bytes()
        if name != "logs/run.log":  # it tells of the last delivery
            assert hash_file(folder / "back") == content.sha256 == hash_file(run.root / name), name


class At(Callback):
    """Does something after a step."""

    def __init__(self, **steps: Callable[[], None]) -> None:
        self.steps = {int(name.removeprefix("step")): action for name, action in steps.items()}

    def on_step_end(self, trainer: Any, report: Any) -> None:
        if action := self.steps.get(report.step):
            action()


def is_there() -> bool:
    """Whether the run has arrived, with a checkpoint."""
    with suppress(Exception):
        return any(name.startswith("checkpoints/") for name in remote().read_manifest().files)
    return False


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_empty_gets_everything(s3: Server, plain: str, tmp_path: Path) -> None:
    def die() -> None:
        until(is_there, "nothing arrived")
        s3.kill()

    def come_back() -> None:
        time.sleep(2.0)  # so that a delivery fails
        s3.start()

    config = mirrored(tmp_path / "outputs")
    run = RunFolder(Path(TrainingWrapper(config, callbacks=(At(step3=die, step5=come_back),)).train().run_dir))
    assert adapter_of(run) == plain
    log = (run.logs / "run.log").read_text()
    assert "Could not connect to the endpoint" in log and "mirror: works again" in log and SECRET not in log
    assert [state.status for state in read_delivery_states(run)] == ["delivered"]
    check_read_back(run, tmp_path)


@pytest.mark.slow
def test_what_a_dead_server_missed_goes_out_by_sync(s3: Server, plain: str, tmp_path: Path) -> None:
    config = mirrored(tmp_path / "outputs", wait_seconds=1)
    run = RunFolder(Path(TrainingWrapper(config, callbacks=(At(step1=s3.kill),)).train().run_dir))
    assert adapter_of(run) == plain
    assert f"training-lens sync {run.root}" in (run.logs / "run.log").read_text()
    (state,) = read_delivery_states(run)
    assert state.status == "waiting" and "files" in state.outstanding and "its end" in state.outstanding
    s3.start()
    assert [state.status for state in send_run(run)] == ["delivered"]
    assert [state.outstanding for state in read_delivery_states(run)] == [""]
    check_read_back(run, tmp_path)


SCRIPT = """
import json, sys, time
from training_lens import TrainingConfig, TrainingWrapper
from training_lens.training.loop.callbacks import Callback

class Wait(Callback):
    def on_step_end(self, trainer, report):
        if report.step == 4:
            time.sleep(600)

TrainingWrapper(TrainingConfig.model_validate(json.loads(sys.argv[1])), callbacks=(Wait(),)).train()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_elsewhere_to_the_same_bits(s3: Server, plain: str, tmp_path: Path) -> None:
    config = mirrored(tmp_path / "outputs").model_dump_json()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, config], stdout=subprocess.DEVNULL)
    try:
        until(is_there, "no checkpoint arrived")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    until(lambda: remote().read_manifest().status == "interrupted", "the courier did not tell of its end")
    run = fetch_to_resume(PLACE, str(tmp_path / "elsewhere"))
    assert run.root.is_relative_to(tmp_path / "elsewhere") and not run.adapter.exists()
    assert TrainingWrapper.resume(run).status == "finished"
    assert adapter_of(run) == plain
    assert [state.status for state in read_delivery_states(run)] == ["delivered"]
    check_read_back(run, tmp_path)


def test_a_large_file_is_verified_without_reading_it_back(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training_lens.integrations.storage.PART_BYTES", 5 * 2**20)  # the least that S3 takes
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(11 * 2**20)  # three parts
    storage = open_storage(PLACE)
    storage.put_file(large, "large")
    assert "-3" in storage._read_info("large")["ETag"]  # type: ignore[attr-defined]
    assert storage.verify("large", large)
    with large.open("r+b") as file:
        file.write(b"!")
    assert not storage.verify("large", large)


@pytest.mark.parametrize("wrong", ["bucket", "credentials", "server"])
def test_what_is_wrong_is_one_clear_line(
    s3: Server, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"bucket": "The specified bucket does not exist", "credentials": "AWS_ACCESS_KEY_ID", "server": "no answer"}
    if wrong == "credentials":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    if wrong == "server":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    place = "s3://other/path" if wrong == "bucket" else PLACE
    (tmp_path / "file").write_text("content")
    with pytest.raises(IntegrationError, match=said[wrong]) as caught:
        open_storage(place).put_file(tmp_path / "file", "file")
    assert str(caught.value).startswith(place) and "\n" not in str(caught.value)
    assert SECRET not in str(caught.value) and os.environ.get("AWS_SECRET_ACCESS_KEY", "x") not in str(caught.value)


def test_an_empty_bucket_is_empty_and_no_bucket_is_an_error(s3: Server) -> None:
    assert list_remote_runs(open_storage(PLACE)) == [] and open_storage(PLACE).list() == {}
    for ask in (list_remote_runs, lambda storage: storage.list()):
        with pytest.raises(IntegrationError, match="s3://other/path: not there: The specified bucket does not exist"):
            ask(open_storage("s3://other/path"))
