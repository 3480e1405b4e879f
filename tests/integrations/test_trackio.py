"""trackio shows what metrics.jsonl holds, each step once; read back by its own storage."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from training_lens.integrations.send_run import read_delivery_states, send_run
from training_lens.runs.run_folder import RunFolder

from .conftest import BINS, SAMPLES, due  # type: ignore[import-not-found]


@contextmanager
def trackio_at(place: Path) -> Iterator[Path]:
    """Within the block trackio is imported anew: it reads its place once, when it is imported."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
            del sys.modules[name]

    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(place))
        yield place
    forget()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with trackio_at(tmp_path_factory.mktemp("trackio")) as place:
        yield place


@pytest.fixture
def sending(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The config that sends to a project of the test's own."""
    options = {"enabled": True, "folder": str(folder), "project": request.node.name.replace("test_", "")[:40]}
    return {"tracking": {"mlflow": {"enabled": False}, "trackio": options}}


def logs(project: str) -> list[dict[str, Any]]:
    """All that trackio has of the only run of a project."""
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_run_records(project)
    lines: list[dict[str, Any]] = SQLiteStorage.get_logs(project, run["name"], run_id=run["id"])
    return lines


def shown(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Of each metric the steps and values."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(("train/", "validation")):
                found.setdefault(name, []).append((line["step"], value))
    return found


@pytest.mark.slow
def test_the_courier_sends_a_run_by_its_end(sent_run: RunFolder) -> None:
    with trackio_at(sent_run.root.parents[3] / "trackio"):
        check_run(sent_run, "default")


def test_a_run_is_there_at_its_end(unsent_run: RunFolder, sending: dict[str, Any]) -> None:
    send_run(unsent_run, sending)
    check_run(unsent_run, sending["tracking"]["trackio"]["project"])


def check_run(run: RunFolder, project: str) -> None:
    from trackio import Api

    assert shown(logs(project)) == due(run)
    (found,) = Api().runs(project)
    assert found.name == run.run_id and found.config["peft.r"] == 4
    last = logs(project)[-1]
    assert last["whole_run/steps"] == 6 and "- status: finished" in last["summary"]["_value"]


def test_a_run_that_is_sent_twice_is_shown_once(unsent_run: RunFolder, sending: dict[str, Any]) -> None:
    send_run(unsent_run, sending)
    once = logs(sending["tracking"]["trackio"]["project"])
    (cursor,) = (unsent_run.tracking / "trackio").glob("cursor*.json")
    cursor.unlink()  # as after a crash before it was written
    assert [state.status for state in send_run(unsent_run, sending)] == ["delivered"]
    assert logs(sending["tracking"]["trackio"]["project"]) == once
    assert shown(once) == due(unsent_run)


def test_samples_and_histograms_are_of_its_own_types(unsent_run: RunFolder, sending: dict[str, Any]) -> None:
    send_run(unsent_run, sending)
    lines = logs(sending["tracking"]["trackio"]["project"])
    tables = [line["samples"] for line in lines if "samples" in line]
    assert [table["_value"] for table in tables] == [line["samples"] for line in SAMPLES]
    assert {table["_type"] for table in tables} == {"trackio.table"}
    (histogram,) = [line["weights/model.q_proj.A"] for line in lines if "weights/model.q_proj.A" in line]
    assert histogram == {"_type": "trackio.histogram", "values": BINS["counts"], "bins": [-0.5, 0.0, 0.5, 1.0]}


def test_a_killed_run_goes_on_in_the_same_run(
    unsent_run: RunFolder, sending: dict[str, Any], cut_short: Callable[[RunFolder, int], Callable[[], None]]
) -> None:
    go_on = cut_short(unsent_run, 4)
    send_run(unsent_run, sending)
    go_on()
    send_run(unsent_run, sending)
    assert shown(logs(sending["tracking"]["trackio"]["project"])) == due(unsent_run)


def test_a_run_that_was_deleted_there_comes_again_whole(unsent_run: RunFolder, sending: dict[str, Any]) -> None:
    from trackio import Api

    project = sending["tracking"]["trackio"]["project"]
    send_run(unsent_run, sending)
    next(iter(Api().runs(project))).delete()
    send_run(unsent_run, sending, again=True)
    assert shown(logs(project)) == due(unsent_run)


def test_nothing_listens_and_nothing_runs_on(unsent_run: RunFolder, sending: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    send_run(unsent_run, sending)
    assert [thread for thread in threading.enumerate() if thread not in before] == []
    assert "gradio" not in sys.modules and "trackio.launch" in sys.modules


def test_another_folder_in_one_process_is_left_to_another(
    unsent_run: RunFolder, sending: dict[str, Any], tmp_path: Path, folder: Path
) -> None:
    import trackio  # noqa: F401

    sending["tracking"]["trackio"]["folder"] = str(tmp_path / "elsewhere")
    (state,) = send_run(unsent_run, sending)
    assert state.status == "left" and f"uses trackio in {folder} already" in state.error
    assert read_delivery_states(unsent_run, sending)[0].status == "waiting"


def test_a_project_that_trackio_refuses_is_left_with_the_key(unsent_run: RunFolder, sending: dict[str, Any]) -> None:
    sending["tracking"]["trackio"]["project"] = "registry-mine"
    (state,) = send_run(unsent_run, sending)
    assert state.status == "left" and "Name it with tracking.trackio.project." in state.error


def test_without_the_package_one_line_says_how_to_get_it(
    unsent_run: RunFolder, sending: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    (state,) = send_run(unsent_run, sending)
    assert state.error == "needs the package trackio. Install: pip install 'training-lens[trackio]'."
