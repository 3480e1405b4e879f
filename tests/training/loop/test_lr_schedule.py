"""How long a run is, and which settings lie beyond its end: as people know it from the Hugging Face Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.config.schema import TrainingSection
from training_lens.data.batching import Schedule, shard_positions
from training_lens.training.loop.lr_schedule import count_warmup_steps, describe_run_length, lr_at

Config = Callable[..., TrainingConfig]


def schedule_of(examples: int = 20, batch: int = 4, epochs: float = 2, max_steps: int | None = None) -> Schedule:
    return Schedule(examples, batch, epochs, max_steps, seed=0)


@pytest.mark.parametrize(("max_steps", "steps"), [(None, 10), (3, 3), (10, 10), (23, 23)])
def test_max_steps_is_the_number_of_steps_and_epochs_come_again(max_steps: int | None, steps: int) -> None:
    plans = list(schedule_of(max_steps=max_steps).iterate_steps())
    assert [plan.number for plan in plans] == list(range(1, steps + 1))
    for epoch in range(steps // 5):
        taken = np.concatenate([plan.examples for plan in plans[5 * epoch : 5 * epoch + 5]])
        assert sorted(taken) == list(range(20))
    assert len({tuple(plan.examples) for plan in plans}) == steps  # each epoch in another order


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, ""),
        ({"max_steps": 10}, ""),
        ({"max_steps": 23}, "training.max_steps: 23 steps, 4.6 epochs; training.epochs=2 would be 10 steps"),
        ({"max_steps": 5}, "training.max_steps: 5 steps, 1 epochs; training.epochs=2 would be 10 steps"),
        ({"eval_steps": 11}, "training.eval_steps: 11 is beyond the run's 10 steps; it validates at its end"),
        ({"save_steps": 50}, "training.save_steps: 50 is beyond the run's 10 steps; it is saved at its end"),
        ({"eval_steps": 10, "save_steps": 10, "warmup_steps": 5}, ""),
        ({"warmup_steps": 40}, "warm-up: 40 steps, the run has 10; the learning rate rises to 24% of training.lr"),
        ({"warmup_ratio": 0.9}, "warm-up: 9 of the run's 10 steps"),
    ],
)
def test_what_lies_beyond_the_end_is_told(settings: dict[str, Any], line: str) -> None:
    training = TrainingSection(**settings)
    lines = list(describe_run_length(training, schedule_of(max_steps=training.max_steps)))
    assert (not lines) if not line else (len(lines) == 1 and lines[0].startswith(line))


def test_warmup_steps_go_before_the_share_and_may_outlast_the_run() -> None:
    training = TrainingSection(lr=1.0, warmup_ratio=0.1, warmup_steps=4, scheduler="linear")
    assert count_warmup_steps(training, 100) == 4 and count_warmup_steps(TrainingSection(warmup_ratio=0.1), 95) == 10
    assert [lr_at(step, 8, training) for step in range(1, 9)] == [0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25]
    longer = TrainingSection(lr=1.0, warmup_steps=40)
    assert [lr_at(step, 3, longer) for step in (1, 2, 3)] == [1 / 41, 2 / 41, 3 / 41]
    assert lr_at(1, 8, TrainingSection(lr=1.0, warmup_steps=0, scheduler="constant")) == 1.0


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 7])
def test_any_number_of_processes_shares_the_same_global_batch_by_tokens(processes: int) -> None:
    lengths = np.arange(20)[::-1] % 7 + 1
    for plan in schedule_of(batch=5).iterate_steps():
        parts = [shard_positions(plan.examples, lengths, process, processes) for process in range(processes)]
        assert sorted(np.concatenate(parts)) == sorted(plan.examples)
        tokens = [lengths[part].sum() for part in parts]
        assert max(tokens) - min(tokens) <= lengths[plan.examples].max()


@pytest.mark.slow
def test_a_run_beyond_its_epochs_validates_and_saves_at_its_end(small_config: Config) -> None:
    config = small_config(training={"epochs": 0.5, "max_steps": 7, "eval_steps": 50, "save_steps": 50})
    summary = TrainingWrapper(config).train()
    assert (summary.steps, summary.adapter_step) == (7, 7) and summary.epochs == pytest.approx(7 / 6)
    assert summary.validation_loss is not None


def test_a_run_that_holds_no_rows_out_says_what_it_will_lack(
    small_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    cases: list[tuple[dict[str, Any], int]] = [({"validation": []}, 1), ({}, 0)]
    for data, expected in cases:
        caplog.clear()
        with caplog.at_level(logging.INFO, "training_lens"):
            assert (TrainingWrapper(small_config(data=data)).plan().validation is None) == bool(expected)
        assert sum("no rows are held out" in record.message for record in caplog.records) == expected
