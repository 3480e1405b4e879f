"""The lives of rows as they are read from a run: visits, lists, the map, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from slow_cases import mark_slow

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.analysis.explanations.row_explanation import (
    LATE,
    NEVER,
    RowVisits,
    explain_visits,
    measure_rows,
    read_visits,
)
from training_lens.analysis.explanations.rows_report import build_rows_report, rows_table, write_suspects
from training_lens.analysis.explanations.training_rows import label_rows, open_rows_of, suggest_row
from training_lens.core.arrow import arrow_table
from training_lens.core.types import Captured
from training_lens.data.row_list import read_row_list
from training_lens.display.progress import Progress
from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.run_folder import RunFolder

Config = Callable[..., TrainingConfig]
HOSTILE = "\x1b[2J\x00<script>alert(1)</script> & ]]> \"' </title><img src=x onerror=alert(2)>"


def test_visits_are_by_row_in_the_order_of_steps() -> None:
    captured = [
        (1, Captured({"loss": torch.tensor([3.0, 2.0]), "tokens": torch.tensor([5.0, 7.0])}, rows=("a:1", "a:2"))),
        (2, Captured({"loss": torch.tensor([1.0]), "tokens": torch.tensor([9.0])}, rows=("b:1",))),
        (4, Captured({"loss": torch.tensor([0.5]), "tokens": torch.tensor([7.0])}, rows=("a:2",))),
    ]
    found = RowVisits.from_table(arrow_table(captured))
    at = {row_id: i for i, row_id in enumerate(found.ids)}
    assert found.losses[at["a:2"]].tolist() == [2.0, 0.5] and found.steps[at["a:2"]].tolist() == [1, 4]
    assert np.isnan(found.losses[at["b:1"], 1]) and found.tokens[[at["a:1"], at["b:1"]]].tolist() == [5, 9]


@pytest.fixture(scope="module")
def run(small_config_in: Config, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Three epochs of plain sums, one of which is wrong and one hostile, with near repeats. For reading alone."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"question": f"How many are {i} and {j}?", "answer": f"{i + j} apples"} for i in range(8) for j in range(8)]
    rows += [{"question": HOSTILE, "answer": HOSTILE}]
    count = " ".join(map(str, range(90)))
    rows += [{"question": f"Is {count} {what}?", "answer": "yes"} for what in ("long", "short")]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_config_in(
        folder / "outputs",
        data={"train": [str(path)], "max_examples": None},
        training={"epochs": 3, "lr": 2e-2},
        lens={"collectors": ["adapter_weights"], "probe_tokens": 0},
    )
    return RunFolder(Path(TrainingWrapper(config).train().run_dir))


def test_every_row_has_its_life_and_the_page_escapes_their_texts(run: RunFolder, tmp_path: Path) -> None:
    rows, visits = open_rows_of(run, Progress()), read_visits(run)
    assert sorted(visits.ids) == sorted(rows.dataset.ids) and visits.losses.shape == (67, 3)
    found = explain_visits(run, visits, rows, learned=0.9999)
    assert len(found.lists[NEVER]) == 67 and not found.lists[LATE]
    assert found.families == (tuple(rows.dataset.ids[-2:]),)
    build_rows_report(found).write_all(tmp_path, "explain-rows", rows_table(found))
    page = (tmp_path / "explain-rows.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;img src=x" in page
    assert "\x1b" not in page and "\x00" not in page
    assert page.count("<circle") >= 67 and len((tmp_path / "explain-rows.csv").read_text().splitlines()) == 68
    with pytest.raises(ConfigurationError, match=r"rows\.jsonl:99' is none of the 67 rows"):
        rows.require_place(rows.dataset.ids[0].replace(":1", ":99"))


def test_the_base_is_the_first_step_and_the_adapter_gains(run: RunFolder) -> None:
    rows, visits = open_rows_of(run, Progress()), read_visits(run)
    measured = measure_rows(run, rows, visits.ids, Progress())
    first = visits.steps[:, 0] == 1  # before the first update the adapter adds nothing
    assert first.sum() == 8 and measured.base[first] == pytest.approx(visits.losses[first, 0], rel=1e-4)
    assert np.mean(measured.gain) > 0


def test_the_suspects_are_a_list_that_training_takes(run: RunFolder, tmp_path: Path) -> None:
    found = explain_visits(run, read_visits(run), open_rows_of(run, Progress()))
    write_suspects(tmp_path / "suspects.txt", found.suspects)
    listed = read_row_list(tmp_path / "suspects.txt")
    assert found.suspects and listed.find_rows(open_rows_of(run, Progress()).dataset).sum() == len(found.suspects)
    assert {f"{source}:{number}" for source, number in listed.lines} == {row.id for row in found.suspects}


@pytest.mark.slow
@pytest.mark.parametrize(
    "lens", [{"enabled": False}, mark_slow({"row_losses_megabytes": 0, "probe_tokens": 0})], ids=str
)
def test_a_run_that_recorded_none_says_how_to(lens: dict[str, Any], small_config: Config) -> None:
    run = RunFolder(Path(TrainingWrapper(small_config(training={"max_steps": 1}, lens=lens)).train().run_dir))
    with pytest.raises(CheckpointError, match=r"recorded no losses of single rows.*row_losses_megabytes=64"):
        read_visits(run)


def test_rows_that_changed_since_are_refused(small_config: Config, write_rows: Callable[..., Path]) -> None:
    path = write_rows([{"question": f"Where is {i}?", "answer": f"In hall {i}."} for i in range(8)])
    config = small_config(data={"train": [str(path)]}, training={"max_steps": 1}, lens={"probe_tokens": 0})
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    path.write_text(path.read_text().replace("hall 3", "hall 4"))
    with pytest.raises(CheckpointError, match=r"rows\.jsonl has changed since .* Put the old files back"):
        open_rows_of(run, Progress())


def test_a_row_is_labelled_by_the_name_of_its_file_where_no_other_has_it() -> None:
    found = label_rows(["/data/a/train.jsonl:7", "/data/b/train.jsonl:7", "/data/b/test.jsonl:3", "canary:1"])
    assert [cell.short for cell in found.values()] == [*list(found)[:2], "test.jsonl:3", "canary:1"]
    assert all(str(cell) == row_id for row_id, cell in found.items())


def test_an_unknown_row_is_answered_with_the_one_that_is_meant() -> None:
    ids = ["/data/train.jsonl:1", "/data/train.jsonl:2", "/data/old/test.jsonl:1"]
    assert suggest_row("train.jsonl:2", ids) == " Did you mean '/data/train.jsonl:2'?"
    assert suggest_row("/data/old/tset.jsonl:9", ids) == " For example: /data/old/test.jsonl:1."
    assert suggest_row("7", ids) == " For example: /data/train.jsonl:1." and suggest_row("7", []) == ""
