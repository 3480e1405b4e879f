"""The validation sample: eight validations in a run, always the same rows, at a bounded share of the tokens."""

from __future__ import annotations

import numpy as np
import pytest

from training_lens.data.batching import Schedule
from training_lens.training.loop.loop_plan import TOKEN_SHARE, draw_validation_sample


def schedule(examples: int, epochs: float = 2, batch: int = 8) -> Schedule:
    return Schedule(examples, batch, epochs, None, seed=0)


@pytest.mark.parametrize("examples", [400, 1000, 8000, 100_000])
@pytest.mark.parametrize("rows", [20, 100, 1000])
def test_a_run_has_eight_validations_within_the_share(examples: int, rows: int) -> None:
    plan, lengths = schedule(examples), np.random.default_rng(0).integers(20, 200, rows)
    sample = draw_validation_sample(lengths, plan, 100.0)
    assert sample is not None and 8 <= len(sample.positions) <= rows
    more = [step for step in range(sample.every, plan.total_steps, sample.every) if step % plan.steps_per_epoch]
    assert len(more) * lengths[sample.positions].sum() <= TOKEN_SHARE * 2 * examples * 100.0
    assert len(more) + 2 >= 8 or examples == 400
    again = draw_validation_sample(lengths, plan, 100.0)
    assert again is not None and np.array_equal(sample.positions, again.positions)


def test_many_epochs_need_no_sample_and_a_few_steps_afford_none() -> None:
    lengths = np.full(50, 100)
    assert draw_validation_sample(lengths, schedule(400, epochs=8), 100.0) is None
    assert draw_validation_sample(lengths, schedule(40), 100.0) is None
