"""Rows that a run leaves out, and canaries that it plants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.data.canaries import DIGITS, Canaries, draw_candidates
from training_lens.errors import CheckpointError, DatasetError
from training_lens.runs.run_folder import RunFolder
from training_lens.training.plan import RunPlan
from training_lens.training.resume import require_same_tokens

Config = Callable[..., TrainingConfig]
ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(24)]


def plan(config: TrainingConfig) -> RunPlan:
    return TrainingWrapper(config).plan()


@pytest.fixture
def rows(write_rows: Callable[..., Path]) -> str:
    return str(write_rows(ROWS))


def test_listed_rows_are_left_out_and_all_others_stay_where_they_were(
    small_config: Config, rows: str, tmp_path: Path
) -> None:
    data: dict[str, Any] = {"train": [rows], "val_ratio": 0.25}
    whole = plan(small_config(data=data))
    out = [whole.train.example_id(0), whole.train.example_id(3), whole.held_out_ids()[0]]
    (tmp_path / "out.txt").write_text("\n".join(out))
    less = plan(small_config(data={**data, "exclude": str(tmp_path / "out.txt")}))
    assert set(whole.train.ids) - set(less.train.ids) == set(out[:2])
    assert set(whole.held_out_ids()) - set(less.held_out_ids()) == set(out[2:])
    assert less.data_report()["excluded"] == sorted(out, key=lambda row_id: int(row_id.rpartition(":")[2]))
    assert less.count_rows_and_steps()["excluded_rows"] == 3
    assert less.fingerprint != whole.fingerprint
    (tmp_path / "out.txt").write_text(f"{rows}:25")
    with pytest.raises(DatasetError, match="line 1"):
        plan(small_config(data={**data, "exclude": str(tmp_path / "out.txt")}))


def test_canaries_are_planted_as_often_as_they_repeat_and_never_held_out(small_config: Config, rows: str) -> None:
    data: dict[str, Any] = {"train": [rows], "val_ratio": 0.25, "canaries": 2, "canary_repeats": [1, 4]}
    config = small_config(data=data)
    planned = plan(config)
    ids, without = planned.train.ids, plan(small_config(data={"train": [rows], "val_ratio": 0.25}))
    assert ids[: len(without.train)] == without.train.ids and planned.held_out_ids() == without.held_out_ids()
    assert ids[len(without.train) :] == [f"canary:{n}" for n in (1, 2, *[3] * 4, *[4] * 4)]
    assert planned.count_rows_and_steps()["canary_rows"] == 10 and planned.duplicates == without.duplicates
    text = planned.tokenizer.decode(planned.train[len(ids) - 1].input_ids)
    found = Canaries.from_record(planned.data_report()["canaries"])
    assert found == planned.rows.canaries and found.rows[3].answer in text
    assert [row.repeats for row in found.rows] == [1, 1, 4, 4, 0, 0]  # the last two are planted nowhere
    visited = [int(i) for step in planned.schedule.iterate_steps() for i in step.examples]
    assert sorted(visited) == list(range(len(ids)))
    assert plan(config).fingerprint == planned.fingerprint


def test_the_canaries_of_weighted_sources_come_once(small_config: Config, rows: str) -> None:
    planned = plan(small_config(data={"train": [rows], "weights": [2.0], "canaries": 1, "canary_repeats": [3]}))
    assert planned.schedule.epoch_examples == 2 * 24 + 3


@pytest.mark.slow
def test_other_rows_left_out_are_other_data(small_config: Config, rows: str, tmp_path: Path) -> None:
    listed = tmp_path / "out.txt"
    listed.write_text(f"{rows}:1")
    config = small_config(data={"train": [rows], "exclude": str(listed)}, training={"max_steps": 1})
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    require_same_tokens(run, plan(config))
    listed.write_text(f"{rows}:2")
    with pytest.raises(CheckpointError, match="no longer what it was"):
        require_same_tokens(run, plan(config))


def test_candidates_are_different_and_of_one_form() -> None:
    canary = Canaries.draw(1, [1], seed=3).rows[0]
    found = draw_candidates(canary, 200, seed=3)
    assert len({*found, canary.answer}) == 200 and found == draw_candidates(canary, 200, seed=3)
    codes = np.array([[int(digit) for digit in answer[len("The code is ") : -1].split()] for answer in found])
    assert codes.shape == (199, DIGITS) and codes.min() == 0 and codes.max() == 9
