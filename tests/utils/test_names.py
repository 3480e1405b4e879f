"""No name from outside leads out of its folder: not a run's, an experiment's, a file's, nor a link's."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from training_lens.config.compose import compose
from training_lens.errors import CheckpointError, ConfigurationError, IntegrationError
from training_lens.integrations.storage import LocalStorage
from training_lens.runs.housekeeping import change_tags, check_deletable, delete_run
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.runs.run_lookup import find_run_folders
from training_lens.utils.files import atomic_file, write_json
from training_lens.utils.names import check_experiment, check_run_id, expand_home, find_name_fault, require_contained

NEVER = (
    "",
    " ",
    ".",
    "..",
    "../x",
    "a/b",
    "/a",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\u202eb",
    "\x1b[2Jx",
    ".tmp-x",
    "-rf",
    "latest",
)


@pytest.mark.parametrize("name", [*NEVER, "a b", "ä", "a:b", "[b]", "x" * 101, "a\ufe0f", "none"])
def test_a_run_id_is_ascii_and_begins_with_a_letter_or_digit(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a folder"):
        check_run_id(name)
    with pytest.raises(ConfigurationError, match=r"output\.run_id"):
        compose(overrides=[f"output.run_id='{name}'"] if name.strip() else ['output.run_id="  "'])


@pytest.mark.parametrize("name", [*NEVER, "x" * 101, "ü" * 101, "\U0001f600" * 60, "a\u200bb", " a", "a "])
def test_an_experiment_shows_its_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a folder"):
        check_experiment(name)


def test_a_home_that_nobody_has_is_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/a") == tmp_path / "a"
    for name in ("~nobody-of-that-name/a", "~x\0y", "a\0b", "~\0"):
        assert expand_home(name) == Path(name)


def test_names_of_today_and_of_earlier_runs_pass() -> None:
    for name in ("20261120T203605Z-5f3a", "trial-0003-5f3a", "a.b_c-d", "x" * 100, "7"):
        assert check_run_id(name) == name == check_experiment(name)
    for name in ("my runs", "gsm8k (2)", "[b]", "größe"):
        assert check_experiment(name) == name


@pytest.mark.parametrize(
    "name", ["", "..", "a/../b", "/etc/passwd", "C:/x", "a//b", "./a", "a\\..\\b", "a\nb", "x" * 256]
)
def test_a_file_name_stays_below_its_folder(name: str, tmp_path: Path) -> None:
    assert find_name_fault(name)
    (tmp_path / "file").write_text("x")
    storage = LocalStorage(tmp_path / "s")
    with pytest.raises(IntegrationError, match="names nothing in this storage"):
        storage.put_file(tmp_path / "file", name)
    with pytest.raises(IntegrationError, match="names nothing in this storage"):
        storage.delete(name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_that_leads_out_of_a_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "inside").symlink_to(folder / "logs")
    require_contained(folder)
    (folder / "logs/metrics.jsonl").symlink_to(tmp_path / "precious")  # not there yet: it would be made
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is a symbolic link to .*precious"):
        require_contained(folder)
    require_contained(folder, besides=("logs",))


def test_what_is_written_whole_never_goes_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / f".tmp-{os.getpid()}-file").symlink_to(precious)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("theirs")
    assert precious.read_text() == "mine" and (tmp_path / "file").read_text() == "theirs"


def make(base: Path, run_id: str) -> RunFolder:
    run = RunFolder(runs_folder(str(base), "default") / run_id).create()
    write_json(run.metadata / "summary.json", {"status": "finished"})
    return run


def test_a_deletion_takes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    run, old = make(tmp_path, "a"), make(tmp_path, ".tmp-x")  # an id that earlier versions took
    (fetched := run.root.with_name(".tmp-fetched-b")).mkdir()  # another process is at it
    delete_run(run)
    assert old.root.is_dir() and fetched.is_dir() and not run.root.exists()


def test_a_run_behind_a_link_is_neither_deleted_nor_tagged(tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs", "a")
    runs_folder(str(tmp_path), "default").parent.parent.mkdir(parents=True)
    runs_folder(str(tmp_path), "default").parent.symlink_to(theirs.root.parents[1])
    (run,) = find_run_folders(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"is a symbolic link to .*delete it by hand"):
        check_deletable(run)
    own = make(tmp_path / "own", "b")
    (own.metadata / "tags.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(CheckpointError, match="symbolic link"):
        change_tags(own, ["x"])


def test_runs_of_earlier_versions_are_listed_and_names_that_do_not_print_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("my run", "good", "[b]"):
        make(tmp_path, name)
    for name in ("a\nb", "a\u202eb"):
        (runs_folder(str(tmp_path), "default") / name / "metadata").mkdir(parents=True)
    monkeypatch.setattr(logging.getLogger("training_lens"), "propagate", True)  # a command that ran before said no
    assert [run.run_id for run in find_run_folders(str(tmp_path))] == ["[b]", "good", "my run"]
    told = {record.getMessage() for record in caplog.records if "does not print" in record.getMessage()}
    assert len(told) == 2 and any(r"'a\nb'" in line for line in told)
