"""A form becomes a command line and a process: values arrive as they are, and only the run's own process is stopped."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.testclient import TestClient

from training_lens.config.keys import known_keys
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.runs.run_folder import PROCESS, RunFolder
from training_lens.ui import run_process
from training_lens.ui.launcher import build_launch_routes, validate_settings
from training_lens.ui.settings_form import COMMON, NOT_OFFERED, FormSettings, check_settings, describe_form, look_up
from training_lens.ui.web import ERROR_HANDLERS, Outputs

SECONDS = 240  # that a process may take here
HOSTILE = "$(touch pwned); rm -rf * `touch pwned` & --debug\n--json 'x' \"y\" \\"
STARTER = """
import json, sys, time
from pathlib import Path
from training_lens.ui.launcher import Launcher
from training_lens.ui.settings_form import FormSettings, check_settings
from training_lens.ui.web import Outputs
outputs = Outputs(Path("outputs"))
launch = Launcher(outputs).start_training(check_settings(FormSettings("", json.loads(sys.argv[1])), outputs.folder))
print(launch.run, flush=True)
time.sleep(600)
"""
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    st.text("'\"\\,[]{}=:$()#~+- \nnulaé日", min_size=1),
).filter(str.strip)


def open_client(folder: Path) -> TestClient:
    app = Starlette(routes=build_launch_routes(Outputs(folder)), exception_handlers=ERROR_HANDLERS)
    return TestClient(app)


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
    return value


def wait_for_end(client: TestClient, run_id: str) -> dict[str, Any]:
    def read_ended() -> dict[str, Any] | None:
        now: dict[str, Any] = client.get(f"/api/launch/{run_id}").json()
        return None if now["running"] else now

    found: dict[str, Any] = wait_until(read_ended)
    return found


def all_fields() -> dict[str, dict[str, Any]]:
    return {field["key"]: field for group in describe_form()["groups"] for field in group["fields"]}


def test_the_form_has_every_key_but_what_names_code_and_what_the_dashboard_gives() -> None:
    fields = all_fields()
    assert {*known_keys(TrainingConfig)} - {*fields} == {*NOT_OFFERED, "sweep.storage"}
    assert {key for key, field in fields.items() if field["common"]} == {*COMMON}
    assert fields["peft.r"]["type"] == "integer" and fields["peft.r"]["minimum"] == 1
    assert fields["training.lr"]["nullable"] and fields["training.lr"]["exclusive_minimum"] == 0
    assert fields["model.quantization"]["choices"] == ("none", "4bit", "8bit")
    assert json.loads(json.dumps(fields)).keys() == fields.keys()


def test_a_form_at_its_defaults_is_the_bare_command() -> None:
    defaults = {key: field["default"] for key, field in all_fields().items()}
    for preset in ({"name": "", "values": {}}, *describe_form()["presets"]):
        checked = check_settings(FormSettings(preset["name"], {**defaults, **preset["values"]}), Path("outputs"))
        assert checked.problems == () and checked.words == (
            (f"+experiment={preset['name']}",) if preset["name"] else ()
        )


def test_what_differs_from_a_preset_is_in_the_command_and_all_problems_come_at_once(tmp_path: Path) -> None:
    client = open_client(Path("outputs"))
    values: dict[str, Any] = {"training.epochs": 2, "training.lr": "1e-3", "peft.r": 16}
    answer = client.post("/api/launch/command", json={"preset": "quick_test", "values": values}).json()
    assert answer == {
        "command": "training-lens train +experiment=quick_test training.epochs=2 training.lr=1e-3",
        "problems": [],
    }
    values = {
        "peft.r": "many", "training.scheduler_cycles": 3, "training.lrr": 1, "model.trust_remote_code": True,
        "tracking.custom": {"os.system": {}}, "model.id": None, "training.epochs": "1,2", "data.template": "a\0b",
        "output.mirror": "s3://me:password@host",
    }  # fmt: skip
    answer = client.post("/api/launch/command", json={"values": values}).json()
    assert {problem["key"] for problem in answer["problems"]} == {*values}
    assert "password" not in json.dumps(answer) and "os.system" not in answer["command"]
    refused = client.post("/api/launch/start", json={"values": values})
    assert refused.status_code == 400 and "peft.r: given 'many', expected a whole number" in refused.json()["error"]
    for body in ({"preset": "nope"}, {"preset": 3}, {"values": [1]}):
        assert client.post("/api/launch/start", json=body).status_code == 400
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4), st.dictionaries(TEXTS, st.integers(1, 99), max_size=3))
@example(HOSTILE, [HOSTILE, "a,b\\", "null", "{a: b}", "[x]"], {"a.b": 1, "'q'": 2})
@example("null", ["'x'"], {})
@example("'quoted'", ['"', "\\", "\\'"], {"\\": 1})
@example("a,b", [" padded "], {"": 1})
def test_any_value_comes_back_the_same_from_compose(text: str, texts: list[str], ranks: dict[str, int]) -> None:
    keys = ("tracking.wandb.name", "tracking.wandb.project", "data.fields.instruction", "peft.target_modules")
    given_values = {**dict.fromkeys(keys, text), "tracking.wandb.tags": texts, "peft.rank_pattern": ranks}
    checked = check_settings(FormSettings("", given_values), Path("outputs"))
    assert checked.config is not None, checked.problems
    assert {key: look_up(checked.config, key) for key in given_values} == given_values
    assert all(word.split("=")[0] in known_keys(TrainingConfig) for word in checked.words)  # none is an option


def test_a_start_that_fails_before_its_run_exists_is_explained_and_leaves_no_zombie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client = open_client(Path("outputs"))
    values = {"data.train": "missing.jsonl"}
    started = client.post("/api/launch/start", json={"values": values}).json()
    ended = wait_for_end(client, started["run"])
    assert ended["exit_code"] == 1 and "data.train: 'missing.jsonl' is not there" in ended["log_tail"]
    wait_until(lambda: not Path(f"/proc/{started['pid']}").exists())
    other = open_client(Path("outputs"))  # a server that started later
    assert wait_until(lambda: other.get(f"/api/launch/{started['run']}").json()["exit_code"]) == 1
    checked = client.post("/api/launch/validate", json={"values": values}).json()
    assert checked["exit_code"] == 1 and checked["error"].startswith("data.train: 'missing.jsonl' is not there")
    for path in ("/api/launch/nothing", "/api/launch/..%2Fnothing"):
        assert client.get(path).status_code == 404
    stopped = client.post(f"/api/runs/default/{started['run']}/stop", json={})
    assert stopped.status_code == 400 and "there is nothing to stop" in stopped.json()["error"]


@pytest.mark.slow
def test_a_run_outlives_the_server_and_is_stopped_and_resumed_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_rows: dict[str, list[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["--debug; $(touch pwned)\n'a', [b].jsonl", '"c\\d".jsonl']  # names of files
    for name in rows:
        shutil.copy(few_rows["train"][0], name)
    experiment = "späte Läufe $(touch pwned)"
    values = {
        "data.train": rows, "data.validation": few_rows["validation"][0], "output.experiment_name": experiment,
        "tracking.wandb.name": HOSTILE, "peft.r": 4, "training.max_steps": 60, "training.batch_size": 4,
        "lens.enabled": False, "tracking.samples": 0, "tracking.tensorboard": False,
    }  # fmt: skip
    run = start_and_kill_the_server(values, Path("outputs/experiments") / experiment / "runs")
    client = open_client(Path("outputs"))
    place = f"/api/runs/{experiment}/{run.run_id}"

    def has_begun() -> bool:
        launch = client.get(f"/api/launch/{run.run_id}").json()
        assert launch["running"], launch
        return run.metrics_file.exists() and run.metrics_file.read_text().count('"kind": "step"') > 2

    wait_until(has_begun)
    assert run.status == "running"
    assert "is running already" in client.post(f"{place}/resume", json={}).json()["error"]
    first, second = (client.post(f"{place}/stop", json={}).json() for _ in range(2))
    assert "it saves itself" in first["message"] and "a stop was requested before" in second["message"]
    wait_until(lambda: run.status == "interrupted")  # its process has not ended yet: a resume waits for that
    assert len(list(run.checkpoints.iterdir())) == 1
    assert json.loads((run.metadata / PROCESS).read_text())["pid"] == first["pid"]

    resumed = client.post(f"{place}/resume", json={}).json()
    assert shlex.split(resumed["command"]) == ["training-lens", "train", "--resume", str(run.root)]
    assert "is running already" in client.post(f"{place}/resume", json={}).json()["error"]  # before it has the lock
    ended = wait_for_end(client, run.run_id)
    assert ended["exit_code"] == 0 and "resuming after step" in ended["log_tail"]
    assert run.status == "finished" and run.read_metadata("summary.json")["steps"] == 60
    assert "is finished" in client.post(f"{place}/resume", json={}).json()["error"]
    assert "is finished" in client.post(f"{place}/stop", json={}).json()["error"]
    config = TrainingConfig.model_validate(run.read_metadata("config.json"))
    assert config.data.train == rows and config.tracking.wandb.name == HOSTILE
    assert not Path("pwned").exists() and all(Path(name).exists() for name in rows)


def start_and_kill_the_server(values: dict[str, Any], runs: Path) -> RunFolder:
    """A run whose server got Ctrl-C in its terminal and was killed before the run's folder existed."""
    server = subprocess.Popen(
        [sys.executable, "-c", STARTER, json.dumps(values)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stdout is not None
    with server.stdout as lines:
        run_id = lines.readline().strip()
        os.killpg(server.pid, signal.SIGINT)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    assert run_id and not runs.exists()
    return RunFolder(runs / run_id)


def test_only_the_process_that_trains_the_run_is_ever_signalled(tmp_path: Path, own_run: RunFolder) -> None:
    run = RunFolder(tmp_path / "outputs/experiments/default/runs" / own_run.run_id)
    shutil.copytree(own_run.root, run.root)
    client = open_client(tmp_path / "outputs")

    def refuse_to_stop() -> str:
        answer = client.post(f"/api/runs/default/{run.run_id}/stop", json={})
        assert answer.status_code == 400
        return str(answer.json()["error"])

    assert "is finished" in refuse_to_stop()
    run.write_metadata("summary.json", {**run.read_metadata("summary.json"), "status": "running"})
    assert "is interrupted: there is nothing to stop" in refuse_to_stop()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander:
        with run.hold_lock():
            own = json.loads((run.metadata / PROCESS).read_text())
            for pid in (os.getpid(), bystander.pid, os.getppid(), 1, 0, -1, True, "1", None, 2**40):
                (run.metadata / PROCESS).write_text(json.dumps({**own, "pid": pid}))
                assert "is not certain" in refuse_to_stop(), pid
            (run.metadata / PROCESS).write_text(json.dumps({**own, "host": "elsewhere"}))
            assert "another machine" in refuse_to_stop()
        time.sleep(0.2)
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.parametrize("proc", ["/proc", "/there is none"])
def test_a_process_is_known_and_stopped_on_systems_with_and_without_proc(
    proc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_process, "PROC", Path(proc))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        start = run_process.read_start(process.pid)
        assert start is not None and run_process.is_same_process(process.pid, start)
        with pytest.raises(ConfigurationError, match="has ended"):
            run_process.interrupt_process(process.pid, start + 1)  # an earlier process of this id
        assert process.poll() is None
        run_process.interrupt_process(process.pid, start)
        wait_until(lambda: run_process.read_start(process.pid) is None)  # a zombie, too, has ended
        assert process.wait() == -signal.SIGINT
    for pid in (process.pid, 0, -1, 2**40):
        assert not run_process.is_same_process(pid, start)


def test_a_client_that_hangs_up_ends_its_validation() -> None:
    async def hang_up() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    checked = check_settings(FormSettings("", {}), Path("outputs"))
    answer = anyio.run(validate_settings, checked, Request({"type": "http"}, hang_up))
    assert answer["exit_code"] is None and not answer["ok"]


@pytest.mark.slow
def test_validation_gives_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_rows: dict[str, list[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"data.train": few_rows["train"], "data.val_ratio": 0.1, "peft.r": 4, "training.max_steps": 2}
    answer = open_client(Path("outputs")).post("/api/launch/validate", json={"values": values}).json()
    assert answer["ok"] and answer["exit_code"] == 0, answer
    assert answer["result"]["config"]["peft"]["r"] == 4 and answer["result"]["estimate"]["seconds"] > 0
