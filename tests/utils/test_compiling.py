"""C is compiled once, and every reason why it cannot be is told."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from training_lens.models.fast.native import library as calls
from training_lens.utils.compiling import CompilationError, compile_library, find_compiler

pytestmark = pytest.mark.skipif(calls.load_library() is None, reason="no C compiler here")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "training-lens"


def source(folder: Path, value: int = 7) -> Path:
    path = folder / "answer.c"
    path.write_text(f"long answer(void) {{ return {value}; }}\n", encoding="utf-8")
    return path


def answer(library: ctypes.CDLL) -> int:
    found: int = library.answer()
    return found


def test_what_was_compiled_is_loaded_the_next_time(tmp_path: Path, cache: Path) -> None:
    assert answer(compile_library([source(tmp_path)], "answers")) == 7
    (kept,) = cache.iterdir()
    made = kept.stat().st_mtime_ns
    assert answer(compile_library([source(tmp_path)], "answers")) == 7
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [made]


def test_another_source_is_another_library(tmp_path: Path, cache: Path) -> None:
    assert answer(compile_library([source(tmp_path)], "answers")) == 7
    assert answer(compile_library([source(tmp_path, 8)], "answers")) == 8
    assert len(list(cache.iterdir())) == 2


def test_a_library_that_others_may_write_is_compiled_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_library([source(tmp_path)], "answers")
    (loaded,) = cache.iterdir()
    other = tmp_path / "other" / "training-lens" / loaded.name  # the loaded one stays mapped: it must not change
    other.parent.mkdir(parents=True)
    other.write_bytes(b"not a library")
    other.chmod(0o722)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert answer(compile_library([source(tmp_path)], "answers")) == 7
    assert other.stat().st_mode & 0o077 == 0 and other.read_bytes() != b"not a library"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir(mode=0o500)
    assert answer(compile_library([source(tmp_path)], "answers")) == 7


def test_a_file_where_the_cache_should_be_is_done_without(tmp_path: Path, cache: Path) -> None:
    cache.parent.write_text("in the way", encoding="utf-8")
    assert answer(compile_library([source(tmp_path)], "answers")) == 7


def test_no_compiler_is_told_by_its_name(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    with pytest.raises(CompilationError, match=r"no C compiler \(no-such-compiler\)"):
        compile_library([source(tmp_path)], "answers")


def test_a_source_that_is_refused_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("this is no C\n", encoding="utf-8")
    with pytest.raises(CompilationError, match=r"refuses the source: .*error"):
        compile_library([broken], "broken")
    assert not list(cache.iterdir())


def test_a_compiler_that_does_not_know_this_processor_compiles_for_any(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As clang before version 15 does on a Mac."""
    compiler = tmp_path / "older"
    real = find_compiler()[0]
    refuse = 'case "$*" in *native*) echo "unsupported argument native" >&2; exit 1;; esac'
    compiler.write_text(f'#!/bin/sh\n{refuse}\nexec {real} "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    with caplog.at_level("INFO", "training_lens"):
        assert answer(compile_library([source(tmp_path)], "answers")) == 7
    assert "compiled for any processor of this kind" in caplog.text
