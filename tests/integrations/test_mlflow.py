"""MLflow shows what metrics.jsonl holds, each step once, in one run; read back by its own client."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from training_lens.errors import DamagedFileError, IntegrationError
from training_lens.integrations.mlflow import MlflowIntegration, _safe_name
from training_lens.integrations.record import RunRecord
from training_lens.integrations.send_run import read_delivery_states, send_run
from training_lens.integrations.wandb import build_artifacts
from training_lens.runs.run_folder import RunFolder

from .conftest import SAMPLES, due  # type: ignore[import-not-found]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of SQLAlchemy
ON = {"tracking": {"mlflow": {"enabled": True}, "trackio": {"enabled": False}}}


@pytest.fixture(autouse=True)
def _no_server_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def client_of() -> Iterator[Callable[[RunFolder], Any]]:
    """MLflow's client of the database beside a run."""
    from mlflow import MlflowClient

    yield lambda run: MlflowClient(f"sqlite:///{run.root.parents[3] / 'mlflow.db'}")


def only_run(client: Any) -> Any:
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run


def history(client: Any, run: Any) -> dict[str, list[tuple[int, float]]]:
    """Of each metric all that was ever logged, as steps and values."""
    keys = [key for key in run.data.metrics if not key.startswith("whole_run/")]
    return {key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)] for key in keys}


def table(client: Any, run: Any, path: str) -> Any:
    """A table of a run as MLflow's own loader gives it, which asks the environment where to look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
        return client.load_table(run.info.experiment_id, path, run_ids=[run.info.run_id])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_run_is_there_while_it_trains_and_whole_at_its_end(
    sent_run: RunFolder, client_of: Callable[[RunFolder], Any], tmp_path: Path
) -> None:
    client = client_of(sent_run)
    shown = only_run(client)
    assert history(client, shown) == due(sent_run)
    assert (shown.info.run_name, shown.info.status) == (sent_run.run_id, "FINISHED")
    assert shown.data.params["peft.r"] == "4" and shown.data.params["training.lr"] == "0.003"
    summary = json.loads((sent_run.metadata / "summary.json").read_text())
    assert shown.data.metrics["whole_run/validation_loss"] == summary["validation_loss"]
    weights = client.download_artifacts(shown.info.run_id, "adapter/adapter_model.safetensors", str(tmp_path))
    assert sha256(Path(weights)) == sha256(sent_run.adapter / "adapter_model.safetensors")
    assert {file.path for file in client.list_artifacts(shown.info.run_id)} >= {"lens.html", "config.json"}
    losses = table(client, shown, "validation.json")
    assert list(losses[losses["of"] == "all"]["loss"]) == [loss for _, loss in due(sent_run)["validation/loss"]]
    assert [state.status for state in read_delivery_states(sent_run, ON)] == ["delivered"]


@pytest.mark.slow
def test_nothing_is_told_of_the_user_or_their_repository(
    sent_run: RunFolder, client_of: Callable[[RunFolder], Any]
) -> None:
    """By the courier, which is a process of its own."""
    require_nothing_of_the_user(only_run(client_of(sent_run)))


def require_nothing_of_the_user(shown: Any) -> None:
    assert not {"mlflow.user", "mlflow.source.name", "mlflow.source.git.commit"} & set(shown.data.tags)
    assert shown.info.user_id in ("", "unknown")


def test_a_run_that_is_sent_twice_is_shown_once(
    unsent_run: RunFolder, client_of: Callable[[RunFolder], Any], tmp_path: Path
) -> None:
    send_run(unsent_run, ON)
    (cursor,) = (unsent_run.tracking / "mlflow").glob("cursor*.json")
    cursor.unlink()  # as after a crash before it was written
    assert [state.status for state in send_run(unsent_run, ON)] == ["delivered"]
    client = client_of(unsent_run)
    shown = only_run(client)
    require_nothing_of_the_user(shown)
    assert history(client, shown) == due(unsent_run)
    samples = table(client, shown, "samples.json")
    assert list(samples["generated"]) == [line["samples"][0]["generated"] for line in SAMPLES]
    assert list(samples["step"]) == [0, 6]


def test_a_killed_run_goes_on_in_the_same_run(
    unsent_run: RunFolder,
    client_of: Callable[[RunFolder], Any],
    cut_short: Callable[[RunFolder, int], Callable[[], None]],
) -> None:
    go_on = cut_short(unsent_run, 4)
    send_run(unsent_run, ON)
    client = client_of(unsent_run)
    assert only_run(client).info.status == "KILLED"
    go_on()
    send_run(unsent_run, ON)
    shown = only_run(client)
    assert shown.info.status == "FINISHED"
    assert history(client, shown) == due(unsent_run)
    send_run(unsent_run, {"tracking": {**ON["tracking"], "send_seconds": 9}})  # no setting of the run
    assert history(client, only_run(client)) == due(unsent_run)


def test_a_run_that_was_deleted_there_comes_again_whole(
    unsent_run: RunFolder, client_of: Callable[[RunFolder], Any]
) -> None:
    send_run(unsent_run, ON)
    client = client_of(unsent_run)
    client.delete_run(only_run(client).info.run_id)
    send_run(unsent_run, ON, again=True)
    shown = only_run(client)
    assert history(client, shown) == due(unsent_run) and shown.info.status == "FINISHED"


def test_an_experiment_that_was_deleted_is_left_with_what_to_do(
    unsent_run: RunFolder, client_of: Callable[[RunFolder], Any]
) -> None:
    client = client_of(unsent_run)
    client.delete_experiment(client.create_experiment("default", str(unsent_run.root / "none")))
    (state,) = send_run(unsent_run, ON)
    assert state.status == "left" and "mlflow experiments restore --experiment-id 1" in state.error


@pytest.mark.slow
def test_a_dead_server_changes_no_bit_and_sync_sends_elsewhere(
    sent_run: RunFolder, tmp_path: Path, client_of: Callable[[RunFolder], Any]
) -> None:
    from training_lens import TrainingConfig, TrainingWrapper

    with socket.socket() as closed:  # bound and never listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        values = json.loads((sent_run.metadata / "config.json").read_text())
        values["output"]["base_output_dir"] = str(tmp_path / "outputs")
        values["output"].pop("run_id", None)
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        values["tracking"] |= {"wait_seconds": 1, "trackio": {"enabled": False}}
        values["tracking"]["mlflow"] = {"enabled": True, "uri": uri}
        run = RunFolder(Path(TrainingWrapper(TrainingConfig.model_validate(values)).train().run_dir))
    weights = "adapter_model.safetensors"
    assert sha256(run.adapter / weights) == sha256(sent_run.adapter / weights)
    (state,) = read_delivery_states(run)
    assert state.status == "waiting" and "lines of its journals, its end" in state.outstanding
    local = f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}"
    assert [state.status for state in send_run(run, {"tracking": {"mlflow": {"uri": local}}})] == ["delivered"]
    client = client_of(run)
    assert history(client, only_run(client)) == due(run)
    assert read_delivery_states(run)[0].outstanding == "8 lines of its journals, its end"  # of the dead server


def test_a_server_that_does_not_answer_is_said_in_one_line(
    unsent_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        integration = MlflowIntegration(RunRecord(unsent_run, {"tracking": {"mlflow": {"uri": uri}}}))
        with pytest.raises(IntegrationError, match=f"^the server {uri} cannot be reached .ConnectionError..$"):
            integration.deliver(ended=True)


def test_the_trials_of_a_sweep_bear_its_name(unsent_run: RunFolder, client_of: Callable[[RunFolder], Any]) -> None:
    trial = RunFolder(unsent_run.root.rename(unsent_run.root.with_name("trial-0003-5f3a")))
    send_run(trial, ON)
    shown = only_run(client_of(trial))
    assert shown.data.tags["training_lens.sweep"] == RunRecord(trial).experiment
    assert shown.info.run_name == "trial-0003-5f3a"


def test_without_the_package_one_line_says_how_to_get_it(
    unsent_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    (state,) = send_run(unsent_run, ON)
    assert state.status == "unavailable"
    assert state.error == "needs the package mlflow. Install: pip install 'training-lens[mlflow]'."


def test_a_server_needs_no_database_package(unsent_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alembic", None)
    MlflowIntegration(RunRecord(unsent_run, {"tracking": {"mlflow": {"uri": "http://127.0.0.1:1"}}})).require()
    with pytest.raises(IntegrationError, match="needs the package alembic"):
        MlflowIntegration(RunRecord(unsent_run)).require()


def test_mlflow_takes_every_name_and_keeps_them_apart() -> None:
    from mlflow.utils.validation import _validate_metric_name

    names = ["train/loss", "validation/loss_Q&A", "validation/loss_Q+A", "a//b", "a/../b", "l" * 300, "ß/丈", ".", ""]
    safe = [_safe_name(name) for name in names]
    for name in safe:
        _validate_metric_name(name)
    assert safe[0] == "train/loss" and len(set(safe)) == len(names)


@pytest.mark.filterwarnings("ignore:Query string argument")
def test_a_password_in_the_address_is_kept_nowhere(unsent_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    database = unsent_run.root.parents[3] / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}?of=http://me:planted-secret@host")
    assert [state.status for state in send_run(unsent_run, ON)] == ["delivered"]
    files = [path for path in unsent_run.root.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if b"planted-secret" in path.read_bytes()]


@pytest.mark.slow
def test_a_damaged_adapter_is_sent_to_no_tracker(unsent_run: RunFolder, client_of: Callable[[RunFolder], Any]) -> None:
    weights = unsent_run.adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (state,) = send_run(unsent_run, ON)
    assert state.status != "delivered" and f"{weights} differs from the sha256 that was recorded" in state.error
    client = client_of(unsent_run)
    assert not client.list_artifacts(only_run(client).info.run_id, "adapter")
    with pytest.raises(DamagedFileError, match="differs from the sha256"):
        list(build_artifacts(RunRecord(unsent_run), "x"))
    weights.write_bytes(content)
    assert [state.status for state in send_run(unsent_run, ON)] == ["delivered"]
