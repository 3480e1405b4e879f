"""Rows are read again and again in one order, and remembered without their texts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from training_lens.config.data_sections import DataSection
from training_lens.data.row_list import read_excluded_rows
from training_lens.data.sources import expand_sources
from training_lens.display.progress import Progress
from training_lens.errors import DatasetError
from training_lens.preparation.corpus import Corpus, build_catalogue

ROWS = [
    {"question": f"Who is {i}?", "answer": f"Tom {i}.</s>", "domain": "ab"[i % 2], "user": i // 2} for i in range(6)
]


def corpus_of(*paths: Path) -> Corpus:
    return Corpus.from_sources(expand_sources([str(path) for path in paths], "data.train"), DataSection(), Progress())


def test_every_pass_sees_the_same_rows_in_the_same_order(write_rows: Callable[..., Path]) -> None:
    corpus = corpus_of(write_rows(ROWS[:4], "a.jsonl"), write_rows(ROWS[4:], "b.jsonl"))
    first, second = (list(corpus.read_rows("reading")) for _ in range(2))
    assert first == second and [dict(row.values) for row, _ in first] == ROWS
    assert all(e.messages[-1].text.endswith("</s>") for _, e in first)
    assert [e.messages[-1].text for e in corpus.read_examples("reading")] == [f"Tom {i}." for i in range(6)]


def test_the_catalogue_knows_each_row_s_place_domain_and_group(write_rows: Callable[..., Path]) -> None:
    a, b = write_rows(ROWS[:4], "a.jsonl"), write_rows([*ROWS[4:], ROWS[0]], "b.jsonl")
    catalogue = build_catalogue(corpus_of(a, b), "user")
    assert [catalogue.row_id(i) for i in (0, 3, 4, 6)] == [f"{a}:1", f"{a}:4", f"{b}:1", f"{b}:3"]
    assert [catalogue.domains[i] for i in catalogue.domain] == ["a", "b", "a", "b", "a", "b", "a"]
    assert catalogue.whole[6] == catalogue.whole[0] and len(set(catalogue.whole.tolist())) == 6
    assert catalogue.group[0] == catalogue.group[1] != catalogue.group[2]


def test_a_source_that_changes_between_passes_is_refused(write_rows: Callable[..., Path]) -> None:
    path = write_rows(ROWS)
    corpus = corpus_of(path)
    path.write_text(path.read_text() * 2)
    with pytest.raises(DatasetError, match=r"rows.jsonl: changed while it was read"):
        build_catalogue(corpus, None)


def test_a_source_that_grows_within_a_later_pass_is_refused(write_rows: Callable[..., Path]) -> None:
    path = write_rows(ROWS)
    corpus = corpus_of(path)
    catalogue = build_catalogue(corpus, None)
    with pytest.raises(DatasetError, match=r"rows.jsonl: changed while it was read"):
        for position, _ in catalogue.enumerate_rows(corpus.read_rows("writing")):
            assert position < len(ROWS)
            if not position:
                grow(path)


def grow(path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")


def test_more_rows_than_there_were_are_refused_before_they_are_used(write_rows: Callable[..., Path]) -> None:
    catalogue = build_catalogue(corpus_of(write_rows(ROWS)), None)
    with pytest.raises(DatasetError, match=r"rows.jsonl: changed while it was read"):
        list(catalogue.enumerate_rows(range(len(ROWS) + 1)))


def test_a_change_that_keeps_size_and_time_is_found_by_the_hash(write_rows: Callable[..., Path]) -> None:
    path = write_rows(ROWS)
    corpus, before = corpus_of(path), path.stat()
    corpus.require_unchanged()
    path.write_text(path.read_text().replace("Tom", "Tim"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DatasetError, match=r"rows.jsonl: changed while it was read"):
        corpus.require_unchanged()
    path.unlink()
    with pytest.raises(DatasetError, match=r"rows.jsonl: changed while it was read"):
        list(corpus.read_rows("reading"))


def test_a_group_field_that_a_source_does_not_have_is_told_as_the_setting(write_rows: Callable[..., Path]) -> None:
    corpus = corpus_of(write_rows(ROWS))
    with pytest.raises(
        DatasetError, match=r"prepare.group_field: .*rows.jsonl has no field 'usr'. Did you mean 'user'"
    ):
        build_catalogue(corpus, "usr")


def test_listed_rows_are_left_out_of_what_is_prepared(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    path, listed = write_rows(ROWS), tmp_path / "out.txt"
    listed.write_text(f"{path}:2\n{path}:5\twrong\n")
    sources, data = expand_sources([str(path)], "data.train"), DataSection(exclude=str(listed))
    corpus = Corpus.from_sources(sources, data, Progress(), read_excluded_rows(sources, data))
    assert [row.number for row, _ in corpus.read_rows("reading")] == [1, 3, 4, 6]
    listed.write_text(f"{path}:7\n")
    with pytest.raises(DatasetError, match=r"line 1: .*rows\.jsonl:7"):
        read_excluded_rows(sources, data)
