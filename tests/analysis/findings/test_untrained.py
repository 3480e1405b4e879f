"""A module that does not move is named, of every kind of adapter; one that moves a little is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from training_lens.analysis.findings import Finding

Find = Callable[..., Finding]


def test_nothing_moves(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_weights", "norm_step")[:] = 0
    found = finding("untrained", healthy)
    assert (found.severity, found.confidence, found.title) == ("problem", "sure", "Nothing trains")


def test_a_module_that_never_moves_is_named_with_what_its_gradient_tells(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_weights", "norm_step")[:, 3] = 0
    moving = finding("untrained", healthy)
    assert moving.severity == "warning" and moving.evidence["modules"] == [healthy.modules[3].name]
    assert "the optimizer does not step them" in moving.action
    for measure in ("norm_a", "norm_b"):
        healthy.values("adapter_gradients", measure)[:, 3] = 0
    assert "no gradient reaches them" in finding("untrained", healthy).action


def test_a_rate_of_zero_is_named(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_weights", "norm_step")[:] = 0
    healthy.values("loss", "lr")[:] = 0
    assert "learning rate is 0" in finding("untrained", healthy).action


def test_a_schedule_that_ends_early_is_named(finding: Find, healthy: Any) -> None:
    for measure in (healthy.values("adapter_weights", "norm_step"), healthy.values("loss", "lr")):
        measure[100:] = 0
    found = finding("untrained", healthy)
    assert (found.severity, found.evidence["step"]) == ("warning", 100) and "schedule" in found.action
    healthy.values("loss", "lr")[100:] = 1e-3
    assert "schedule" not in finding("untrained", healthy).action


def test_a_rate_that_reaches_zero_at_the_end_is_no_early_end(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_weights", "norm_step")[190:] = 0
    assert finding("untrained", healthy).severity == "fine"


def test_the_smallest_step_is_a_step(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_weights", "norm_step")[:, 3] = 0
    healthy.values("adapter_weights", "norm_step")[150, 3] = 1e-30
    assert finding("untrained", healthy).severity == "fine"


def test_two_steps_decide_nothing_because_a_warm_up_may_begin_at_zero(finding: Find, healthy: Any) -> None:
    steps, columns = healthy.tables["adapter_weights"]
    healthy.tables["adapter_weights"] = (steps[:2], {m: np.zeros_like(v[:2]) for m, v in columns.items()})
    assert finding("untrained", healthy).confidence == "inconclusive"


def test_without_steps_two_captures_whose_norms_are_the_same_did_not_move(finding: Find, healthy: Any) -> None:
    """As of checkpoints. PiSSA's B is never 0, so it is not B that tells."""
    steps, columns = healthy.tables["adapter_weights"]
    columns = {measure: columns[measure][[99, 199]].copy() for measure in ("norm_a", "norm_b")}
    columns["norm_b"][1, 0] = columns["norm_b"][0, 0]
    healthy.tables["adapter_weights"] = (steps[[99, 199]], columns)
    assert finding("untrained", healthy).evidence["modules"] == [healthy.modules[0].name]
