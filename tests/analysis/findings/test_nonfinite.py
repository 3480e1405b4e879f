"""The first number that is not finite is named with its step and its clean neighbour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from training_lens.analysis.findings import Finding

Find = Callable[..., Finding]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_gradients_go_backward_so_the_last_broken_module_is_where_it_began(
    finding: Find, healthy: Any, broken: float
) -> None:
    for measure in ("norm_a", "norm_b"):
        healthy.values("adapter_gradients", measure)[150:, :6] = broken
    found = finding("nonfinite", healthy)
    assert (found.severity, found.confidence) == ("problem", "sure")
    assert found.evidence["module"] == healthy.modules[5].name
    assert found.evidence["clean_neighbour"] == healthy.modules[6].name
    assert found.evidence["step"] == 151 and "6 of 16" in found.measured


def test_of_weights_the_first_is_named(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_weights", "norm_b")[120:, 4:] = np.nan
    found = finding("nonfinite", healthy)
    assert found.evidence["module"] == healthy.modules[4].name
    assert found.evidence["clean_neighbour"] == healthy.modules[3].name


def test_the_loss_before_all(finding: Find, healthy: Any) -> None:
    healthy.values("loss", "loss")[99:] = np.nan
    healthy.values("adapter_gradients", "norm_b")[99:] = np.nan
    found = finding("nonfinite", healthy)
    assert found.severity == "problem" and found.measured == "first the loss, at step 100"


def test_all_modules_at_once_say_that_the_origin_is_not_known(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_gradients", "norm_b")[99:] = np.nan
    found = finding("nonfinite", healthy)
    assert found.evidence["clean_neighbour"] == "" and "where it began" in found.decide


def test_a_step_that_loss_scaling_skips_is_no_problem(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_gradients", "norm_b")[[0, 1, 90]] = np.inf
    assert finding("nonfinite", healthy).severity == "note"


def test_cosines_without_a_direction_are_not_meant(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_gradients", "cosine_mean")[:] = np.nan
    assert finding("nonfinite", healthy).severity == "fine"
