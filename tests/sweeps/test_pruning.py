"""Pruning by halves: decided by what the trials reported, the same for a run that was gone on with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import TrialState

from training_lens.config.schema import TrainingConfig
from training_lens.sweeps.search_strategies import is_in_worse_half
from training_lens.sweeps.study import SharedStudy
from training_lens.sweeps.worker import Worker


@pytest.mark.parametrize("resumed_after", [None, 1, 2, 3])
def test_halves_are_the_same_for_a_run_that_was_gone_on_with(
    sweep_config: Callable[..., TrainingConfig],
    open_study: Callable[..., SharedStudy],
    tmp_path: Path,
    resumed_after: int | None,
) -> None:
    study = open_study(sweep_config(pruner="successive_halving"))
    decisions = []
    with Worker(tmp_path) as worker:
        first = study.claim_trial(worker)
        assert first is not None
        for validation, loss in enumerate((5.0, 4.0, 3.0), start=1):
            decisions.append(study.report_loss(first, validation, loss))
            if validation == resumed_after:
                study.release_trial(first)
                first = study.claim_trial(worker)
                assert first is not None
        study.end_trial(first, TrialState.COMPLETE, 3.0)
        second, third = study.claim_trial(worker), study.claim_trial(worker)
        assert second is not None and third is not None
        decisions += [study.report_loss(second, validation, loss) for validation, loss in ((1, 4.5), (2, 4.2))]
        decisions += [study.report_loss(third, 1, 4.6)]
        assert not study.report_loss(third, 3, 99.0), "halves are made at validations 1, 2, 4, 8"
    assert decisions == [False] * 4 + [True, True]


def test_the_better_half_goes_on_and_what_is_no_number_does_not() -> None:
    kept = [loss for loss in range(8) if not is_in_worse_half(loss, [other for other in range(8) if other != loss])]
    assert kept == [0, 1, 2, 3]
    assert is_in_worse_half(math.nan, []) and not is_in_worse_half(2.0, [math.nan])
