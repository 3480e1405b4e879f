"""Runs are found by id, path and `latest`; what is not there is said with what is near; one process a run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forked import fork  # type: ignore[import-not-found]

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder, list_run_folders, new_run_id, runs_folder
from training_lens.runs.run_lookup import find_run
from training_lens.utils.files import write_json
from training_lens.utils.integrity import write_sealed


def make(base: Path, run_id: str, status: str, experiment: str = "default") -> RunFolder:
    run = RunFolder(runs_folder(str(base), experiment) / run_id).create()
    write_json(run.metadata / "summary.json", {"status": status})
    return run


@pytest.fixture
def base(tmp_path: Path) -> str:
    """Four runs of two experiments; the one that started last is of the experiment that comes first by name."""
    make(tmp_path, "20260101T000000Z-aaaa", "finished", "b")
    make(tmp_path, "20260102T000000Z-bbbb", "interrupted", "b")
    make(tmp_path, "20260103T000000Z-cccc", "finished", "b")
    make(tmp_path, "20260104T000000Z-dddd", "finished", "a")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("reference", "experiment", "meant"),
    [
        ("latest", None, "dddd"),
        ("latest", "b", "cccc"),
        ("b", None, "cccc"),
        ("a", "b", "dddd"),
        ("20260102T000000Z-bbbb", None, "bbbb"),
        ("20260102T000000Z-bbbb", "a", "bbbb"),
        ("20260102", None, "bbbb"),
        ("2026010", "a", "dddd"),
    ],
)
def test_a_reference_means_one_run_whoever_asks(base: str, reference: str, experiment: str | None, meant: str) -> None:
    assert find_run(reference, base, experiment).run_id.endswith(meant)
    if meant != "bbbb":
        assert find_run(reference, base, experiment, finished=True).run_id.endswith(meant)


@pytest.mark.parametrize(
    ("reference", "experiment", "finished", "message"),
    [
        (
            "latest",
            None,
            False,
            r"Z-dddd \(finished\); expected one that is unfinished. The last unfinished one is .*bbbb",
        ),
        ("latest", "a", False, "No run in experiment a of .* is unfinished"),
        ("latest", "c", None, "no run in experiment c of .* yet"),
        ("2026", None, None, r"'2026' may mean 4 runs; give the folder of one: .*aaaa, .*bbbb"),
        ("20260104T000000Z-dddx", None, True, r"no run '.*dddx' in .*Did you mean '20260104T000000Z-dddd'"),
        ("lates", None, None, r"Did you mean 'latest'\?"),
    ],
)
def test_what_cannot_be_meant_names_what_is_there(
    base: str, reference: str, experiment: str | None, finished: bool | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_run(reference, base, experiment, finished=finished)


def test_the_last_run_is_the_same_for_every_use(base: str) -> None:
    last = make(Path(base), "20260105T000000Z-eeee", "interrupted", "b")
    assert find_run("latest", base) == find_run("latest", base, finished=False) == last
    with pytest.raises(
        CheckpointError, match=r"eeee \(interrupted\).*one is .*dddd\. To finish .*eeee: .*--resume .*eeee"
    ):
        find_run("latest", base, finished=True)


def test_a_name_of_a_run_and_of_an_experiment_is_refused_and_a_path_is_clear(base: str) -> None:
    run = make(Path(base), "a", "finished", "b")
    with pytest.raises(CheckpointError, match="'a' may mean 2 runs"):
        find_run("a", base)
    assert find_run(str(run.root), "elsewhere", "b", finished=True) == run


def test_run_ids_are_unique_and_sort_by_time() -> None:
    ids = [new_run_id() for _ in range(50)]
    assert len(set(ids)) > 45 and ids[0][:8] <= ids[-1][:8]


def test_incomplete_runs_say_what_is_missing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x").create()
    with pytest.raises(CheckpointError, match=r"not a complete run: .*config.json is missing"):
        run.read_metadata("config.json")
    (run.metadata / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no valid JSON"):
        run.read_metadata("config.json")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[RunFolder, BaseProcess]]:
    """A run, and the process that holds it."""
    run = RunFolder(runs_folder(str(tmp_path), "default") / "mine")
    reader, writer = os.pipe()

    def hold() -> None:
        with run.create().hold_lock():
            write_json(run.metadata / "summary.json", {"status": "running"})
            os.write(writer, b"held")
            signal.pause()

    process = fork(hold)
    assert os.read(reader, 4) == b"held"
    yield run, process
    process.kill()
    process.join()
    for descriptor in (reader, writer):
        os.close(descriptor)


def test_a_killed_process_leaves_an_interrupted_run(holder: tuple[RunFolder, BaseProcess]) -> None:
    run, process = holder
    assert run.status == "running" and not run.has_died
    process.kill()
    process.join()
    assert run.status == "interrupted" and run.has_died
    assert run.read_metadata("summary.json")["status"] == "running"
    with run.hold_lock():
        run_again = RunFolder(run.root)
        assert run_again.status == "running"


def test_a_run_has_one_process_at_a_time(holder: tuple[RunFolder, BaseProcess]) -> None:
    run, process = holder
    message = rf"the run mine is being trained by another process \(process {process.pid} on host .*\)\. Wait"
    with pytest.raises(CheckpointError, match=message):
        run.require_free()
    with pytest.raises(CheckpointError, match=message), run.hold_lock():
        pass


def test_a_lock_that_cannot_be_tried_leaves_what_the_run_wrote(tmp_path: Path) -> None:
    run = make(tmp_path, "a", "running")
    assert run.status == "interrupted"
    run.lock_file.mkdir()  # what cannot be opened for writing, as on a read-only file system
    assert run.status == "running"
    run.require_free()


def test_what_a_killed_deletion_left_is_no_run(tmp_path: Path) -> None:
    make(tmp_path, "a", "finished")
    make(tmp_path, ".tmp-b", "finished")
    assert [run.run_id for run in list_run_folders(runs_folder(str(tmp_path), "default"))] == ["a"]


def test_a_summary_that_is_no_summary_is_said(tmp_path: Path) -> None:
    run = make(tmp_path, "a", "finished")
    (run.metadata / "summary.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no summary"):
        _ = run.status


def test_metrics_without_the_line_that_a_kill_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n5\n\xff\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_a_finished_run_says_that_the_end_of_its_metrics_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make(tmp_path, "a", "finished")
    for steps, said in ((2, ""), (3, "it ends at step 2 of 3")):
        run.metrics_file.write_text('{"step": 1}\n{"step": 2}\n')
        write_json(run.metadata / "summary.json", {"status": "finished", "steps": steps})
        assert len(read_metrics(run.metrics_file)) == 2
        assert said in caplog.text and bool(caplog.text) == bool(said)


def test_metrics_that_end_before_the_checkpoint_of_a_resume_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    for step, said in ((2, ""), (4, "it ends at step 2 of 4")):
        assert len(read_metrics(tmp_path / "metrics.jsonl", step)) == 2
        assert said in caplog.text and bool(caplog.text) == bool(said)


@pytest.mark.parametrize("name", ["metadata/summary.json", "checkpoints/step-1/state.json", "logs/metrics.jsonl"])
def test_a_run_has_begun_with_its_first_result(tmp_path: Path, name: str) -> None:
    run = RunFolder(tmp_path / "run").create()
    assert not run.has_begun
    run.require_new()
    (run.root / name).parent.mkdir(parents=True, exist_ok=True)
    (run.root / name).write_text("{}")
    assert run.has_begun
    with pytest.raises(ConfigurationError, match="the run 'run' exists already"):
        run.require_new()


def test_reading_a_status_writes_nothing(own_run: RunFolder) -> None:
    """A run that is being deleted must not get a new lock file from those who watch it."""
    summary = {**own_run.read_metadata("summary.json"), "status": "running"}
    write_sealed(own_run.metadata / "summary.json", summary)
    before = sorted(own_run.root.rglob("*"))
    own_run.lock_file.unlink()
    assert own_run.status == "interrupted" and not own_run.lock_file.exists()
    with own_run.hold_lock():
        assert own_run.status == "running" and not own_run.has_died
    assert own_run.has_died and sorted(own_run.root.rglob("*")) == before
