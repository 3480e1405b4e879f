"""Runs are found by id, path and `latest`; what is not there is said with what is near."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_lens.errors import CheckpointError
from training_lens.utils.files import write_json
from training_lens.utils.runs import RunFolder, find_run, new_run_id, runs_folder


def make(base: Path, run_id: str, status: str) -> RunFolder:
    run = RunFolder(runs_folder(str(base), "default") / run_id).create()
    write_json(run.metadata / "summary.json", {"status": status})
    return run


def test_latest_is_the_newest_of_its_kind(tmp_path: Path) -> None:
    for run_id, status in [("a", "finished"), ("b", "finished"), ("c", "interrupted"), ("d", "failed")]:
        make(tmp_path, run_id, status)
    assert find_run("latest", str(tmp_path), "default", finished=True).run_id == "b"
    assert find_run("latest", str(tmp_path), "default", finished=False).run_id == "d"


def test_ids_and_paths_are_found(tmp_path: Path) -> None:
    run = make(tmp_path, "20260101T000000Z-abcd", "finished")
    assert find_run(run.run_id, str(tmp_path), "default", finished=True) == run
    assert find_run(str(run.root), "elsewhere", "default", finished=True) == run
    with pytest.raises(CheckpointError, match=r"no run '.*abce'.*Did you mean 20260101T000000Z-abcd"):
        find_run("20260101T000000Z-abce", str(tmp_path), "default", finished=True)
    with pytest.raises(CheckpointError, match="no unfinished run"):
        find_run("latest", str(tmp_path), "default", finished=False)


def test_run_ids_are_unique_and_sort_by_time() -> None:
    ids = [new_run_id() for _ in range(50)]
    assert len(set(ids)) > 45 and ids[0][:8] <= ids[-1][:8]


def test_incomplete_runs_say_what_is_missing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x").create()
    with pytest.raises(CheckpointError, match=r"no complete run: .*config.json is missing"):
        run.read_metadata("config.json")
    (run.metadata / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no valid JSON"):
        run.read_metadata("config.json")
