"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training_lens.errors import ConfigurationError, OutputError
from training_lens.utils.files import (
    atomic_file,
    atomic_folder,
    list_files,
    require_writable,
    sweep_temporaries,
    write_json,
    write_text,
)
from training_lens.utils.integrity import safe_save


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_when_done_and_an_older_one_stays(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "x") as folder:
            (folder / "file").write_text(text)
            assert text == "second" or not (tmp_path / "x").exists()
    assert (tmp_path / "x/file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_gives_way_to_a_finished_one_alone(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "x", existing="replace") as folder:
            (folder / text).write_text(text)
            assert text == "first" or (tmp_path / "x/first").exists()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["second"]
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "x", existing="replace"):
        raise RuntimeError
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"not json": object()})
    assert (tmp_path / "a.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_tensors_are_saved_whole(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    safe_save(tensors, tmp_path / "t.safetensors")
    loaded = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[k], v) for k, v in tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_what_is_written_may_be_read_by_all_and_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """Files and folders are made under names that only this user may read."""
    (before := tmp_path / "before").mkdir()
    write_text(before / "file", "text")  # what opens something once in a process has done so
    opened = len(list(Path("/proc/self/fd").iterdir()))
    with atomic_folder(tmp_path / "folder") as folder:
        write_text(folder / "text", "text")
        with atomic_file(folder / "file") as file:
            file.write_text("content")
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "folder" / "text").stat().st_mode & 0o777 == 0o644


def test_only_old_leftovers_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-old").mkdir()
    os.utime(tmp_path / ".tmp-old", (1, 1))
    (tmp_path / ".tmp-new").write_text("someone is writing this")
    sweep_temporaries(tmp_path, older_than_seconds=3600)
    assert [p.name for p in tmp_path.iterdir()] == [".tmp-new"]


def test_a_folder_that_cannot_be_written_names_its_key() -> None:
    with pytest.raises(ConfigurationError, match=r"output.base_output_dir: cannot write in '/proc/x'"):
        require_writable(Path("/proc/x"), "output.base_output_dir")


def test_a_folder_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(KeyError), atomic_folder(target, existing="replace") as building:
        (building / "new").write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["result", "old"]
    with atomic_folder(target, existing="replace") as building:
        (building / "new").write_text("whole")
        assert (target / "old").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["result", "new"]


def test_what_another_process_wrote_meanwhile_is_kept_or_refused_as_asked(tmp_path: Path) -> None:
    target = tmp_path / "x"

    def build(existing: Any) -> None:
        with atomic_folder(target, existing=existing) as building:
            (building / "mine").write_text("mine")
            target.mkdir(exist_ok=True)
            (target / "theirs").write_text("theirs")

    build("keep")
    with pytest.raises(OutputError, match=r"x: another process wrote there meanwhile.*give another folder"):
        build("refuse")
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "theirs"]


def test_a_link_is_replaced_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "disk/old").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/old")
    with atomic_folder(tmp_path / "link", existing="replace") as building:
        (building / "new").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link/new").is_file()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["old"]


def test_an_exchange_that_fails_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "x":
            raise PermissionError(f"{self} stays")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "x", existing="replace"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_files_are_listed_while_folders_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "stays").mkdir()
    (tmp_path / "stays" / "file").write_text("x")
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            for folder in (tmp_path / f"step-{number}" for number in range(20)):
                (folder / "deep" / "er").mkdir(parents=True)
            for number in range(20):
                shutil.rmtree(tmp_path / f"step-{number}")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert all(tmp_path / "stays" / "file" in list_files(tmp_path) for _ in range(300))
    finally:
        done.set()
        thread.join()
    assert list_files(tmp_path / "nothing") == []


def test_what_dead_processes_left_is_swept_by_the_next_write_and_nothing_else(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from training_lens.utils.files import atomic_file, atomic_folder
with atomic_folder(Path({str(tmp_path)!r}) / "a") as folder, atomic_file(Path({str(tmp_path)!r}) / "b") as file:
    (folder / "x").touch(), file.touch()
    os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.glob(".tmp-*"))) == 2
    others = [".tmp-fetched-run", f".tmp-00000000-{os.getppid()}-abcdef-x", ".tmp-old"]
    for name in others:
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "a") as mine:
        (mine / "y").touch()
        write_text(tmp_path / "b", "whole")  # while a folder of this process is being made
        assert sorted(p.name for p in tmp_path.glob(".tmp-*")) == sorted([*others, mine.name])
    assert (tmp_path / "a" / "y").exists()
