"""Paths, globs, embedded names, saved data sets and a hub's ids become sources; what is not there is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from training_lens import embedded
from training_lens.data.sources import expand_sources
from training_lens.errors import DatasetError

ROWS = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]


def test_globs_and_paths_merge_in_order_each_once(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    a, b = write_rows(ROWS, "a.jsonl"), write_rows(ROWS, "b.jsonl")
    sources = expand_sources([str(b), str(tmp_path / "*.jsonl")], "data.train")
    assert [(source.files, source.entry) for source in sources] == [((b,), 0), ((a,), 1)]
    assert expand_sources([embedded.TRAIN], "data.train")[0].files == (embedded.PATHS[embedded.TRAIN],)


def test_saved_data_sets_read_by_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS[:1]), "held": Dataset.from_list(ROWS[1:])}).save_to_disk(
        tmp_path / "two"
    )
    (one,) = expand_sources([str(tmp_path / "one")], "data.train")
    assert [(row.number, row.values) for row in one.read_rows()] == [(1, ROWS[0]), (2, ROWS[1])]
    assert all(file.is_file() for file in one.files)
    train, held = expand_sources([str(tmp_path / "two"), f"{tmp_path}/two:held"], "data.train")
    assert [row.values for row in train.read_rows()] == ROWS[:1] and [row.values for row in held.read_rows()] == ROWS[
        1:
    ]
    with pytest.raises(DatasetError, match="no split 'test'; there are train, held"):
        expand_sources([f"{tmp_path}/two:test"], "data.train")
    with pytest.raises(DatasetError, match="one data set without splits"):
        expand_sources([f"{tmp_path}/one:train"], "data.train")


def test_hub_ids_are_understood_or_refused() -> None:
    with pytest.raises(DatasetError, match=r"write hub:OWNER/NAME\[/CONFIG\]\[@REVISION\]\[:SPLIT\]"):
        expand_sources(["hub:just-a-name"], "data.train")


def test_an_unreachable_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DatasetError, match=r"data\.train: 'hub:nobody/nothing:train' .*cannot be reached"):
        expand_sources(["hub:nobody/nothing:train"], "data.train")


def test_missing_files_suggest_the_nearest(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    write_rows(ROWS, "train.jsonl")
    with pytest.raises(DatasetError, match=r"data\.train: .*trian\.jsonl' is not there.*Did you mean .*train\.jsonl"):
        expand_sources([str(tmp_path / "trian.jsonl")], "data.train")
    with pytest.raises(DatasetError, match="matches no file"):
        expand_sources([str(tmp_path / "*.csv")], "data.train")
    with pytest.raises(DatasetError, match=r"is a folder, expected files.*its 1 files"):
        expand_sources([str(tmp_path)], "data.train")
    with pytest.raises(DatasetError, match=r"there are embedded:train and embedded:heldout"):
        expand_sources(["embedded:trian"], "data.train")
    with pytest.raises(DatasetError, match="an empty path"):
        expand_sources([""], "data.train")
    with pytest.raises(DatasetError, match="no folder"):
        expand_sources([str(tmp_path / "no" / "rows.jsonl")], "data.train")
