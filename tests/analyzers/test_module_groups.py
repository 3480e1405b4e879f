"""Modules are grouped as their matrices would be, and thinned curves keep both ends."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training_lens.analyzers.module_groups import (
    energy_shares,
    find_extremes,
    group_modules,
    group_series,
    json_numbers,
    latest_values,
    nan_median,
    relative_to_base,
    spread_indices,
)
from training_lens.core.modules import module_record
from training_lens.core.types import Series
from training_lens.errors import ConfigurationError

NAMES = ("model.layers.10.mlp.up_proj", "lm_head", "model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj")
MODULES = tuple(module_record(name, (2, 6), (5, 2), 1.0) for name in NAMES)


def series(*rows: list[float]) -> Series:
    return Series(np.arange(1, len(rows) + 1), NAMES, np.array(rows))


def test_layers_are_in_order_with_what_is_outside_last() -> None:
    assert list(group_modules(MODULES, "layer")) == ["2", "10", "outside"]
    assert group_modules(MODULES, "kind") == {"up": [NAMES[0], NAMES[3]], "lm_head": [NAMES[1]], "q": [NAMES[2]]}
    with pytest.raises(ConfigurationError, match="by: 'heads'"):
        group_modules(MODULES, "heads")  # type: ignore[arg-type]


def test_the_norm_of_a_layer_is_that_of_its_matrices_together() -> None:
    norms = group_series(series([1, 2, 3, 4], [0, 0, 6, 8]), MODULES, "layer", norms=True)
    assert norms.names == ("2", "10", "outside") and norms.values.tolist() == [[5, 1, 2], [10, 0, 0]]


def test_a_ratio_of_a_kind_is_the_median() -> None:
    assert group_series(series([1, 2, 3, 5]), MODULES, "kind", norms=False).values.tolist() == [[3, 2, 3]]


def test_a_norm_that_is_missing_makes_no_smaller_sum() -> None:
    holes = series([math.nan, 2, 3, 4])
    assert group_series(holes, MODULES, "kind", norms=True).values == pytest.approx(
        np.array([[math.nan, 2, 3]]), nan_ok=True
    )
    assert group_series(holes, MODULES, "kind", norms=False).values.tolist() == [[4, 2, 3]]


def test_medians_ignore_nan() -> None:
    values = np.array([[1.0, 5, 3], [math.nan, 1, 3], [math.nan] * 3])
    assert nan_median(values) == pytest.approx([3, 2, math.nan], nan_ok=True)


def test_shares_of_the_energy_sum_to_one() -> None:
    shares = energy_shares(series([1, 2, 3, 4], [0, 0, 0, 0]), MODULES, "layer")
    assert shares.values[0] == pytest.approx([25 / 30, 1 / 30, 4 / 30]) and np.isnan(shares.values[1]).all()


def test_strength_is_unknown_where_the_base_is() -> None:
    base = Series(np.zeros(1), NAMES[:2], np.array([[2.0, 4.0]]))
    assert relative_to_base(series([1, 2, 3, 4]), base).values == pytest.approx(
        np.array([[0.5, 0.5, math.nan, math.nan]]), nan_ok=True
    )


def test_thinning_keeps_both_ends_evenly() -> None:
    assert spread_indices(1000, 4).tolist() == [0, 333, 666, 999]
    assert spread_indices(3, 1000).tolist() == [0, 1, 2] and len(spread_indices(0, 1000)) == 0


def test_plain_values_are_finite_or_none() -> None:
    assert json_numbers([1, math.nan, math.inf]) == [1.0, None, None]
    assert latest_values(Series(np.zeros(0), (), np.zeros((0, 0)))) == {}
    assert find_extremes({"a": 3.0, "b": None, "c": 1.0})["most_at"] == "a"
    assert find_extremes({"a": 3.0, "c": 1.0}) == {
        "median": 2.0,
        "least": 1.0,
        "least_at": "c",
        "most": 3.0,
        "most_at": "a",
    }
    assert set(find_extremes({"a": None}).values()) == {None}
