"""Replays without rows: with every row they are the run, to the last bit; from any state alike; else refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training_lens import TrainingWrapper
from training_lens.analysis.explanations.answer_report import (
    build_row_parts,
    describe_row_check,
    describe_rows,
)
from training_lens.display.html import write_page
from training_lens.errors import CheckpointError, ConfigurationError, TrainingError
from training_lens.measures.row_influence import RankCorrelation
from training_lens.models.adapter_files import WEIGHTS
from training_lens.runs.run_folder import RunFolder
from training_lens.training.row_ranking import (
    RowQuestions,
    describe_row_costs,
    draw_controls,
    explain_answer_rows,
    rank_rows,
    read_adam_direction,
    require_enough_subsets,
    verify_rows,
)
from training_lens.training.row_replay import RowReplay
from training_lens.utils.integrity import record_hashes, safe_save

Build = Callable[..., Any]


@pytest.fixture(scope="module")
def train(
    small_config_in: Build, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunFolder]:
    """Trains a model whose steps take milliseconds for 20 steps of 8 rows, with dropout, twice over 80 rows."""

    def run(**sections: dict[str, Any]) -> RunFolder:
        base: dict[str, Any] = {
            "model": {"id": str(tiny_base)},
            "data": {"max_examples": 80, "validation": []},
            "peft": {"lora_dropout": 0.1},
            "training": {"epochs": 2, "lr": 1e-2},
            "lens": {"keep_states": 4},
        }
        merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
        config = small_config_in(tmp_path_factory.mktemp("outputs"), **merged)
        return RunFolder(Path(TrainingWrapper(config).train().run_dir))

    return run


@pytest.fixture(scope="module")
def run(train: Callable[..., RunFolder]) -> RunFolder:
    return train()


@pytest.fixture(scope="module")
def replay(run: RunFolder) -> RowReplay:
    return RowReplay(run)


def test_a_replay_ends_where_the_run_ended_and_its_state_does_not_matter(replay: RowReplay) -> None:
    """From each state and from the start, with dropout, without the same rows: one result, to the last bit."""
    late = np.flatnonzero(replay.first_uses() > 8)[:3]
    assert list(replay.states) == [3, 8, 13, 18] and replay.find_start(late) == 8 and replay.end == 20
    query = replay.training_rows.select(late)
    from_start, from_state = (replay.measure(query, [late, late[:1], []], start) for start in (0, 8))
    np.testing.assert_array_equal(from_start.without, from_state.without)
    np.testing.assert_array_equal(from_start.without[2], from_start.whole)  # no row is left out: no bit changes
    assert (from_start.changes[0] < 0).all(), "a row that was learned is less likely without it"


def test_rows_leave_their_steps_and_the_rest_is_as_it_was(replay: RowReplay) -> None:
    is_out = np.zeros(len(replay.training_rows), dtype=bool)
    first, *_ = replay._iterate_steps(0)
    is_out[first.examples] = True
    is_out[next(iter(replay._iterate_steps(1))).examples[:2]] = True
    steps = {step.number: step.examples for step in replay._skip_rows(0, is_out)}
    assert 1 not in steps, "a step without rows makes no update"
    for plan in replay._iterate_steps(1):
        np.testing.assert_array_equal(steps[plan.number], [row for row in plan.examples if not is_out[row]])


def test_an_adapter_that_does_not_come_out_again_is_refused(run: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(Path(shutil.copytree(run.root, tmp_path / "experiments/default/runs" / run.run_id)))
    tensors = load_file(other.adapter / WEIGHTS)
    name = next(iter(tensors))
    tensors[name].flatten()[0].mul_(1 + 1e-6)
    safe_save(tensors, other.adapter / WEIGHTS, {"format": "pt"})
    record_hashes(other.root, [other.adapter / WEIGHTS])
    replay = RowReplay(other)
    with pytest.raises(TrainingError, match=r"does not repeat: replayed from step 18.*in 1 of"):
        replay.measure(replay.training_rows.select(np.array([0])), [], 18)


@pytest.mark.slow
def test_without_states_a_replay_begins_at_the_start(run: RunFolder, tmp_path: Path) -> None:
    bare = RunFolder(Path(shutil.copytree(run.root, tmp_path / "experiments/default/runs" / run.run_id)))
    shutil.rmtree(bare.states)
    replay = RowReplay(bare)
    assert not replay.states and replay.find_start([int(replay.first_uses().argmax())]) == 0
    rows = replay.find_rows([replay.training_rows.example_id(5)])
    assert rows.tolist() == [5] and "2 replays of 20 of 20 steps" in replay.describe_cost(2)
    ranked = rank_rows(replay, replay.training_rows.select(rows))
    assert "the states after steps 20;" in ranked.detail, "the checkpoint of the adapter has moments, too"
    with pytest.raises(ConfigurationError, match=r"nothing.jsonl:1 is no training row"):
        replay.find_rows(["nothing.jsonl:1"])


@pytest.mark.slow
def test_changed_data_is_refused(small_config_in: Build, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(8)]
    file = write_rows(rows)
    config = small_config_in(tmp_path / "outputs", data={"train": [str(file)]}, training={"max_steps": 1})
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    write_rows([*rows[:-1], {"instruction": "Say 7.", "output": "It is another."}])
    with pytest.raises(CheckpointError, match=r"training data of .* is no longer what it was"):
        RowReplay(run)


@pytest.mark.slow
def test_a_copy_of_a_row_is_made_by_that_row(replay: RowReplay) -> None:
    """The query is a row that was trained on: it ranks first, and without it, it is less likely."""
    positions = np.array([11, 40])
    ranking = rank_rows(replay, replay.training_rows.select(positions))
    for query, position in enumerate(positions):
        twins = np.flatnonzero(replay.training_rows.digests == replay.training_rows.digests[position])
        assert ranking.top_rows(1, query)[0] in twins
    found = verify_rows(replay, ranking, replay.training_rows.select(positions[:1]), 3)
    assert found.change < 0 and len(found.control_changes) == 3 == len(found.rows)
    assert found.is_confirmed == (found.change < min(found.control_changes))
    with pytest.raises(ConfigurationError, match="--verify 41: the run has 80 training rows"):
        verify_rows(replay, ranking, replay.training_rows.select(positions[:1]), 41)


def test_controls_are_other_rows_of_like_length_that_come_as_late(replay: RowReplay) -> None:
    rows = np.flatnonzero(replay.first_uses() > 3)[:5]
    drawn = draw_controls(replay, rows, 3, np.random.default_rng(0))
    assert len(set(drawn)) == 5 and not set(drawn) & set(rows) and (replay.first_uses()[drawn] > 3).all()
    assert not set(replay.training_rows.digests[drawn]) & set(replay.training_rows.digests[rows])
    off = np.abs(replay.training_rows.lengths[drawn] - replay.training_rows.lengths[rows])
    assert off.mean() < np.abs(replay.training_rows.lengths[:, None] - replay.training_rows.lengths[rows]).mean()


def test_adams_direction_is_the_update_that_the_optimizer_makes(replay: RowReplay) -> None:
    """With the moments of a state and LoRA+'s factors: the weights move by -rate times it, but for the decay."""
    from training_lens.training.loop.checkpoint_manager import load_checkpoint

    with replay.open_trainer() as trainer:
        load_checkpoint(replay.states[8], trainer.model, trainer.optimizer, trainer.scaler)
        direction, torch_rng = read_adam_direction(trainer), torch.Generator().manual_seed(0)
        sizes = [parameter.numel() for parameter in trainer.parameters]
        gradient = torch.randn(sum(sizes), generator=torch_rng)
        before = torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])
        for parameter, part in zip(trainer.parameters, gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        for group in trainer.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-3 * group["lr_factor"], 0.0
        trainer.optimizer.step()
        after = torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])
    torch.testing.assert_close(before - after, 1e-3 * direction(gradient), rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_a_ranking_needs_two_moments(train: Callable[..., RunFolder]) -> None:
    replay = RowReplay(train(training={"optimizer": "adafactor", "max_steps": 3}))
    with pytest.raises(ConfigurationError, match=r"trained with training.optimizer=adafactor"):
        rank_rows(replay, replay.training_rows.select(np.array([0])))


def test_the_rows_of_an_answer_are_ranked_and_shown_as_text(replay: RowReplay, tmp_path: Path) -> None:
    found = explain_answer_rows(replay, replay.training_rows[17], RowQuestions(shown=4))
    first = found.ranking[0]
    assert len(found.ranking) == 4
    assert first.id == replay.training_rows.example_id(17) and first.first_step == replay.first_uses()[17]
    values = found.as_json()
    assert json.loads(json.dumps(values)) == values and values["verification"] is None
    assert "not measured: this is a ranking" in describe_row_check(found)
    hostile = replace(first, prompt="<script>alert(1)</script>", answer="<img src=x onerror=alert(2)>")
    page = tmp_path / "page.html"
    write_page(page, "rows", build_row_parts(replace(found, ranking=(hostile,))))
    text = page.read_text()
    assert "<script>alert(1)" not in text and "<img src=x" not in text and "&lt;img src=x" in text


@pytest.mark.slow
def test_the_rows_of_an_answer_are_ranked_measured_and_shown_as_text(replay: RowReplay, tmp_path: Path) -> None:
    answer, questions = replay.training_rows[17], RowQuestions(shown=4, verify=2, subsets=16)
    ranking, replays = describe_row_costs(replay, questions)
    assert (
        "the gradient of each of 80 rows at 4 states" in ranking and "at most 22 replays of 20 of 20 steps" in replays
    )
    found = explain_answer_rows(replay, answer, questions)
    assert len(found.ranking) == 4
    first = found.ranking[0]
    assert first.id == replay.training_rows.example_id(17) and first.first_step == replay.first_uses()[17]
    assert found.verification and found.log_probability == pytest.approx(float(found.verification.replayed.whole[0]))
    values = found.as_json()
    assert json.loads(json.dumps(values)) == values and values["datamodeling"]["subsets"] == 16
    assert found.datamodeling and found.datamodeling.changes.shape == (16, 1) and found.datamodeling.changes.std() > 0
    with pytest.raises(ConfigurationError, match="at least 16 random subsets"):
        require_enough_subsets(15)
    hostile = replace(first, prompt="<script>alert(1)</script>", answer="<img src=x onerror=alert(2)>")
    page = tmp_path / "page.html"
    write_page(page, "rows", build_row_parts(replace(found, ranking=(hostile,))))
    text = page.read_text()
    assert "<script>alert(1)" not in text and "<img src=x" not in text and "&lt;img src=x" in text
    assert "Linear datamodeling score" in text and "without 2 random rows of like length" in text
    by_subsets = replace(found, verification=None)
    assert describe_row_check(by_subsets).startswith("measured by random subsets alone. --verify 10 measures it")
    for low, outcome in ((0.1, "the ranking predicts"), (-0.1, "inconclusive, as the interval holds 0; --lds 64")):
        score = replace(found.datamodeling, correlations=(RankCorrelation(0.4, low, 0.7, 16),))
        assert any(outcome in line for line in describe_rows(replace(found, datamodeling=score)))
    bare = explain_answer_rows(replay, answer, RowQuestions(shown=1))
    assert "not measured: this is a ranking" in describe_row_check(bare) and bare.as_json()["verification"] is None
