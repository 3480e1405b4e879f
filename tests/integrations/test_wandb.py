"""Weights & Biases offline is read back by its own reader; what breaks there changes no run, and is sent later."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from slow_cases import slow_but

from training_lens import TrainingWrapper
from training_lens.config.compose import validate_values
from training_lens.errors import IntegrationError
from training_lens.integrations.delivery import IntegrationState
from training_lens.integrations.record import RunRecord
from training_lens.integrations.send_run import read_delivery_states, send_run
from training_lens.integrations.wandb import WandBIntegration, build_wandb_id, require_written
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback
from training_lens.utils.files import hash_file
from training_lens.utils.integrity import write_sealed
from training_lens.utils.nested import flatten_sections

wandb = pytest.importorskip("wandb")
WEIGHTS = "adapter_model.safetensors"
KEY = "0123456789abcdef" * 3
SAMPLE = {"id": "a-1", "prompt": "Where is the cat?", "expected": "On the mat.", "generated": "On the mat."}
HISTOGRAM = {"counts": [1, 2, 3], "low": -0.5, "high": 1.0}


def config(folder: Path, base: Path, rows: dict[str, list[str]], **sent: Any) -> Any:
    """The run of `trained` without its lens, sent somewhere."""
    return validate_values(
        {
            "model": {"id": str(base)},
            "data": {"max_examples": 48, **rows},
            "training": {"epochs": 1, "batch_size": 8, "lr": 3e-3, "logging_steps": 2},
            "peft": {"r": 4},
            "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None, "wandb": sent},
            "lens": {"enabled": False},
            "output": {"base_output_dir": str(folder)},
        }
    )


@pytest.fixture(scope="module")
def trained(lens_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run that was sent nowhere, with samples and histograms in its journals."""
    run = RunFolder(Path(shutil.copytree(lens_run.root, tmp_path_factory.mktemp("outputs") / lens_run.run_id)))
    samples = [{"step": step, "base": step == 0, "samples": [SAMPLE]} for step in (0, 6)]
    run.samples_file.write_text("".join(json.dumps(line) + "\n" for line in samples))
    kinds = {kind: {"model.layers.0.q_proj.A": HISTOGRAM} for kind in ("weights", "gradients")}
    run.histograms_file.write_text(json.dumps({"step": 3, "histograms": kinds}) + "\n")
    return run


@pytest.fixture
def run(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of `trained` of one's own."""
    return RunFolder(Path(shutil.copytree(trained.root, tmp_path / "runs" / trained.run_id)))


@contextmanager
def without_account(folder: Path) -> Iterator[None]:
    """No key and no settings of whoever runs the tests; what the integration sets is put back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(folder))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_DATA_DIR", str(folder / "home"))
        patch.setenv("WANDB_CACHE_DIR", str(folder / "home"))
        yield
        wandb.teardown()  # it remembers the environment


@pytest.fixture(autouse=True)
def nobodys_account(tmp_path: Path) -> Iterator[None]:
    with without_account(tmp_path):
        yield


@pytest.fixture(scope="module")
def sent(trained: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A copy of `trained` that was sent to an offline run. For reading alone."""
    folder = tmp_path_factory.mktemp("sent")
    run = RunFolder(Path(shutil.copytree(trained.root, folder / trained.run_id)))
    with without_account(folder):
        assert statuses(send_run(run, to("offline", tags=["cats"]))) == ["delivered"]
    return run


def to(mode: str, **more: Any) -> dict[str, Any]:
    return {"tracking": {"wandb": {"mode": mode, **more}}}


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))


def read(file: Path, *summary: str) -> list[Any]:
    """The records of a W&B file, by W&B's own reader."""
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--json", *summary, "--no-observability", "--run-file", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(text)] if summary else [json.loads(line) for line in text.splitlines()]


def of_type(file: Path, kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in read(file) if record["type"] == kind]


def rows(file: Path) -> list[dict[str, Any]]:
    return [record["item"] for record in of_type(file, "history")]


def check_history(run: RunFolder, found: list[dict[str, Any]]) -> None:
    """Every due line of metrics.jsonl is there once, with its values, at its step."""
    due = [v for v in read_metrics(run.metrics_file) if v["kind"] != "step" or v["step"] == 1 or v["step"] % 2 == 0]
    losses = {
        (name, row["step"]): row[name] for row in found for name in ("train/loss", "validation/loss") if name in row
    }
    names = {line["kind"]: "train/loss" if line["kind"] == "step" else "validation/loss" for line in due}
    assert losses == {(names[line["kind"]], line["step"]): line["loss"] for line in due}
    assert sum(name in row for row in found for name in ("train/loss", "validation/loss")) == len(due) == 6
    for line in due:
        if line["kind"] == "step":
            (row,) = (row for row in found if row["step"] == line["step"] and "train/loss" in row)
            assert (row["train/lr"], row["train/grad_norm"]) == (line["lr"], line["grad_norm"])


def statuses(states: tuple[IntegrationState, ...]) -> list[str]:
    return [state.status for state in states]


def test_an_offline_run_holds_what_the_run_holds(sent: RunFolder) -> None:
    run, (file,) = sent, offline_runs(sent.tracking / "wandb")
    found = rows(file)
    check_history(run, found)
    assert [row["_step"] for row in found] == [0, 1, 2, 3, 4, 6, 7]  # the last one is the lens's, at step 6
    assert found[3]["weights/model.layers.0.q_proj.A.values"] == [1, 2, 3]
    assert found[3]["gradients/model.layers.0.q_proj.A.bins"] == [-0.5, 0.0, 0.5, 1.0]
    assert found[0]["samples.nrows"] == found[5]["samples.nrows"] == 1
    shown = {name.split(".")[0] for name in found[-1]}
    assert shown >= {"lens/update_strength", "lens/gradient_norm", "lens/findings", "lens/modules"}

    def table(row: dict[str, Any], name: str) -> dict[str, Any]:
        return dict(json.loads((file.parent / "files" / row[f"{name}.path"]).read_text()))

    assert table(found[5], "samples")["data"] == [[6, "adapter", *SAMPLE.values()]]
    validation = read_metrics(run.metrics_file)[-1]
    told = {tuple(line[2:4]): line[4] for line in table(found[5], "validation_table")["data"]}
    assert told[("all", "")] == validation["loss"]
    assert {name: loss for (by, name), loss in told.items() if by == "domain"} == validation["by_domain"]
    modules = table(found[-1], "lens/modules")
    assert "strength" in modules["columns"] and len(modules["data"]) == 14
    assert {d["name"]: d.get("step_metric") for d in of_type(file, "metric") if "name" in d} == {"step": None}
    assert [d["step_metric"] for d in of_type(file, "metric") if d.get("glob_name") == "*"] == ["step"]

    (end,) = read(file, "--summary")
    sent, settings = (
        flatten_sections(end["config"]),
        flatten_sections(RunRecord(run, to("offline", tags=["cats"])).settings),
    )
    assert {key: sent[key] for key in settings} == settings
    summary = RunRecord(run).summary
    assert {key: end["summary"][key] for key in ("status", "steps", "validation_loss")}.items() <= summary.items()
    assert "run_dir" not in end["summary"]
    assert (end["state"], end["exit_code"], end["tags"], end["name"]) == ("finished", 0, ["cats"], run.run_id)


def test_artifacts_are_the_files_of_the_run_and_no_copies(sent: RunFolder) -> None:
    run, (file,) = sent, offline_runs(sent.tracking / "wandb")
    found = {artifact["type"]: artifact for artifact in of_type(file, "artifact") if artifact["type"] != "run_table"}
    assert set(found) == {"model", "report"}
    facts = json.loads(found["model"]["metadata"])
    assert facts["sha256"] == hash_file(run.adapter / WEIGHTS)
    settings, summary = RunRecord(run).settings, RunRecord(run).summary
    assert (facts["base"], facts["validation_loss"]) == (settings["model"]["id"], summary["validation_loss"])
    places = {entry["path"]: entry["local_path"] for entry in found["model"]["manifest"]["contents"]}
    assert places[WEIGHTS] == str(run.adapter / WEIGHTS)
    assert [entry["path"] for entry in found["report"]["manifest"]["contents"]] == ["lens.html"]
    size = sum(path.stat().st_size for path in run.tracking.rglob("*") if path.is_file())
    assert size < (run.reports / "lens.html").stat().st_size


def test_nothing_of_the_machine_or_its_user_is_written(sent: RunFolder) -> None:
    (file,) = offline_runs(sent.tracking / "wandb")
    assert not {"host", "git", "email"} & set(of_type(file, "run")[0])
    assert not {"environment", "stats", "output"} & {record["type"] for record in read(file)}
    assert not (file.parent / "files" / "wandb-metadata.json").exists()


@pytest.mark.slow
def test_what_came_late_goes_under_the_same_id_and_nothing_twice(run: RunFolder) -> None:
    lines, samples = run.metrics_file.read_text().splitlines(keepends=True), run.samples_file.read_text()
    run.metrics_file.write_text("".join(lines[:-1]))  # a run that died in its last validation
    run.samples_file.unlink()
    send_run(run, to("offline"))
    assert statuses(send_run(run, to("offline"))) == ["delivered"]
    assert len(offline_runs(run.tracking / "wandb")) == 1  # nothing new, no run of W&B's
    run.metrics_file.write_text("".join(lines))
    run.samples_file.write_text(samples)
    write_sealed(run.metadata / "summary.json", run.read_metadata("summary.json") | {"seconds": 1.0})
    (state,) = read_delivery_states(run, to("offline"))
    assert state.outstanding == "3 lines of its journals, its end"
    send_run(run, to("offline"))
    first, second = offline_runs(run.tracking / "wandb")
    assert {of_type(file, "run")[0]["run_id"] for file in (first, second)} == {
        WandBIntegration(RunRecord(run)).wandb_id
    }
    found = rows(first) + rows(second)
    check_history(run, found)
    numbers = [row["_step"] for row in found]
    assert numbers == sorted(set(numbers))  # a server takes each


@pytest.mark.parametrize("name", ["trial 3: a/b?", "x" * 200, "20261120T203605Z-5f3a"])
def test_ids_are_such_as_wandb_takes(name: str) -> None:
    found = build_wandb_id("default", name)
    assert wandb.Settings(run_id=found).run_id == found and len(found) <= 128
    assert found == build_wandb_id("default", name) != build_wandb_id("other", name)


class KillsTheClient(Callback):
    """SIGKILL to W&B's process as soon as it is there."""

    def __init__(self) -> None:
        self.killed = 0

    def on_step_end(self, trainer: Any, report: Any) -> None:
        until = time.monotonic() + 20
        while not self.killed and report.step == 3 and time.monotonic() < until:
            for pid in _processes("wandb-core"):
                os.kill(pid, 9)
                self.killed = pid
            time.sleep(0.05)


def _processes(name: str) -> list[int]:
    """Children of our children with that in their command line."""

    def children(pid: int) -> list[int]:
        texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        return [int(child) for text in texts for child in text.split()]

    below = [grandchild for child in children(os.getpid()) for grandchild in children(child)]
    return [pid for pid in below if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_killed_client_changes_no_bit_and_all_is_there_in_the_end(
    trained: RunFolder,
    tiny_base: Path,
    few_rows: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    killer, sending = KillsTheClient(), config(tmp_path, tiny_base, few_rows, mode="offline")
    run = RunFolder(Path(TrainingWrapper(sending, callbacks=(killer,)).train().run_dir))
    assert killer.killed
    assert (run.adapter / WEIGHTS).read_bytes() == (trained.adapter / WEIGHTS).read_bytes()
    log = (run.logs / "run.log").read_text()
    assert "wandb: " in log and "has no captures" not in log
    assert statuses(send_run(run)) == ["delivered"]
    (file,) = offline_runs(run.tracking / "wandb")  # the broken one is gone
    check_history(run, rows(file))
    told = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert told == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_found_and_what_it_did_not_take_is_sent_elsewhere(
    run: RunFolder, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training_lens.integrations.delivery.TRIES_AT_THE_END", 2)
    (state,) = send_run(run, to("offline", folder=str(small_disk)))
    assert state.status == "left" and state.outstanding == "11 lines of its journals, its end"
    assert statuses(send_run(run, to("offline", folder=str(tmp_path / "other")))) == ["delivered"]
    (file,) = offline_runs(tmp_path / "other")
    check_history(run, rows(file))


def test_a_file_that_lacks_its_end_or_a_row_is_found(sent: RunFolder, tmp_path: Path) -> None:
    """On a full disk the client's writer drops records, and says nothing of it."""
    (whole,) = offline_runs(sent.tracking / "wandb")
    (file,) = Path(shutil.copytree(whole.parent, tmp_path / "copy")).glob("run-*.wandb")
    require_written(file.parent, 7)
    with pytest.raises(IntegrationError, match="is incomplete"):
        require_written(file.parent, 8)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(IntegrationError, match="is incomplete"):
        require_written(file.parent, 7)


def test_without_the_package_one_line_says_so(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    (state,) = send_run(run, to("offline"))
    assert state.status == "unavailable"
    assert state.error == "needs the package wandb. Install: pip install 'training-lens[wandb]'."


def test_online_without_a_key_is_found_before_anything_is_asked(run: RunFolder) -> None:
    (state,) = read_delivery_states(run, to("online"))
    assert state.status == "unavailable" and "set WANDB_API_KEY, run `wandb login`" in state.error


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A server on this machine in place of W&B's, that gives every request one HTTP status."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None: ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{servers[-1].server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", slow_but([403], [401, 403]))
def test_a_refused_key_is_not_tried_again(run: RunFolder, answers: Callable[[int], None], status: int) -> None:
    answers(status)
    (state,) = send_run(run, to("online"))
    assert state.status == "left" and state.failures == 0  # no try was followed by another
    assert f"error {status}" in state.error and KEY not in state.error
    assert statuses(send_run(run, to("offline"))) == ["delivered"]  # one place knows nothing of the other


def test_a_server_that_fails_is_given_up_in_time(
    run: RunFolder, answers: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training_lens.integrations.wandb.INIT_SECONDS", 1.0)
    answers(500)
    tracker = WandBIntegration(RunRecord(run, to("online")))
    with pytest.raises(IntegrationError, match="HTTP 500") as caught:
        tracker.deliver(True)
    assert not caught.value.lasting and tracker.outstanding() == "11 lines of its journals, its end"


@pytest.mark.slow
def test_a_server_that_is_not_there_is_asked_again(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_lens.integrations.wandb.INIT_SECONDS", 1.0)
    monkeypatch.setattr("training_lens.integrations.delivery.TRIES_AT_THE_END", 2)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (state,) = send_run(run, to("online"))
    assert (state.status, state.failures) == ("left", 2) and "connection refused" in state.error


@pytest.mark.slow
def test_trials_of_a_sweep_are_one_group(run: RunFolder, tmp_path: Path) -> None:
    settings = RunRecord(run).settings
    trial = RunFolder(Path(shutil.copytree(run.root, tmp_path / "trial-0003-5f3a")))
    settings["output"]["experiment_name"] = "rates"
    trial.write_metadata("config.json", settings)
    send_run(trial, to("offline"))
    (file,) = offline_runs(trial.tracking / "wandb")
    assert of_type(file, "run")[0]["run_group"] == "rates"
