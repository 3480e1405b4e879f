"""Tags are kept as they were given; only a run of its own, at rest, is deleted, and then whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.housekeeping import (
    change_tags,
    check_deletable,
    delete_run,
    measure_size,
    output_folder,
    read_tags,
)
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.utils.files import write_json


def make(base: Path, run_id: str, status: str = "finished") -> RunFolder:
    run = RunFolder(runs_folder(str(base), "default") / run_id).create()
    write_json(run.metadata / "summary.json", {"status": status})
    return run


def test_tags_are_kept_once_and_taken_away(tmp_path: Path) -> None:
    run = make(tmp_path, "a")
    assert change_tags(run, ["x", "y", "x"]) == ("x", "y")
    assert change_tags(run, ["y", "z"]) == ("x", "y", "z")
    assert change_tags(run, ["y"], remove=True) == ("x", "z") == read_tags(run)
    with pytest.raises(ConfigurationError, match="the run a has x, z"):
        change_tags(run, ["w"], remove=True)
    with pytest.raises(ConfigurationError, match="2 problems"):
        change_tags(run, ["good", "two words", "x" * 41])
    assert read_tags(run) == ("x", "z")


@pytest.mark.parametrize("content", ["{", '{"a": "b"}', "[1]", '["a", null]'])
def test_a_file_that_holds_no_tags_is_named(tmp_path: Path, content: str) -> None:
    run = make(tmp_path, "a")
    (run.metadata / "tags.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tags\.json (holds no list of texts|is no valid JSON)"):
        read_tags(run)


def test_the_output_folder_is_known_from_the_place_of_a_run_or_sweep(tmp_path: Path) -> None:
    run = make(tmp_path, "a")
    assert output_folder(run.root) == output_folder(tmp_path / "sweeps" / "mine") == tmp_path
    assert output_folder(tmp_path / "runs" / "a") is None
    assert output_folder(tmp_path / "x" / ".." / "sweeps" / "mine") is None


def test_a_run_is_deleted_whole_and_links_in_it_are_not_followed(tmp_path: Path) -> None:
    run, other = make(tmp_path, "a"), make(tmp_path, "b")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x" * 1000)
    before = measure_size(run)
    (run.root / "link").symlink_to(outside)
    assert measure_size(run) < before + 1000
    (run.root.parent / ".tmp-deleted-old").mkdir()  # what a killed deletion left
    delete_run(run)
    assert [p.name for p in run.root.parent.iterdir()] == ["b"] and other.status == "finished"
    assert (outside / "file").exists()


def test_only_a_run_of_its_own_at_rest_is_deleted(tmp_path: Path) -> None:
    run = make(tmp_path, "a", "running")
    with (
        run.hold_lock(),
        pytest.raises(CheckpointError, match=r"the run a is being trained by another process \(process"),
    ):
        check_deletable(run)
    link = run.root.with_name("link")
    link.symlink_to(run.root)
    with pytest.raises(CheckpointError, match="symbolic link"):
        delete_run(RunFolder(link))
    elsewhere = tmp_path / "mine"
    (elsewhere / "metadata").mkdir(parents=True)
    for place in (elsewhere, run.root / ".." / "a"):
        with pytest.raises(CheckpointError, match="delete it by hand"):
            delete_run(RunFolder(place))
    assert run.root.is_dir() and elsewhere.is_dir()
    delete_run(run)  # its process is gone
    assert not run.root.exists()


def test_a_run_that_may_be_running_is_not_deleted_and_a_broken_one_is(tmp_path: Path) -> None:
    run, broken = make(tmp_path, "a", "running"), make(tmp_path, "b")
    run.lock_file.mkdir()  # what cannot be opened for writing, as another user's lock
    with pytest.raises(CheckpointError, match="its lock cannot be tried"):
        delete_run(run)
    (broken.metadata / "summary.json").unlink()
    delete_run(broken)
    assert run.root.is_dir() and not broken.root.exists()
