"""The forecast of a run of twice the steps: how often its interval holds, and where it says nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from training_lens.measures.curves import (
    FLOOR,
    MEASURED_LAW,
    ForecastLaw,
    fit_law,
    forecast_loss,
    measure_late_gain,
    measure_multiple,
)

RESULTS = Path(__file__).parents[2] / "benchmarks/results/forecast.json"
STEPS = np.arange(1, 9)


def test_the_law_is_what_the_benchmark_measured() -> None:
    found = json.loads(RESULTS.read_text())
    assert {name: pytest.approx(value, abs=0.005) for name, value in found["law"].items()} == asdict(MEASURED_LAW)
    assert found["unseen"]["forecast"] >= 20 and 0.8 <= found["unseen"]["coverage"] <= 0.97


@pytest.mark.parametrize(("pairs", "share"), [(19, 1 - 2 / 20), (39, 1 - 4 / 40), (48, 1 - 4 / 49)])
def test_the_interval_holds_the_share_of_fresh_runs_that_conformal_prediction_promises(
    pairs: int, share: float
) -> None:
    draw = np.random.default_rng(0)
    held = []
    for _ in range(400):
        multiples = draw.standard_t(3, pairs)  # with outliers, as measured ones have
        law = fit_law([0.1] * pairs, multiples, 0.9)
        held.append(np.mean((law.low <= (fresh := draw.standard_t(3, 500))) & (fresh <= law.high)))
    assert np.mean(held) == pytest.approx(share, abs=0.01)


def test_a_forecast_is_in_the_unit_of_the_loss_and_undoes_the_multiple() -> None:
    losses = np.array([5.0, 4.0, 3.5, 3.0, 2.8, 2.6, 2.4, 2.0])
    gain, late = measure_late_gain(STEPS, losses, 6.0) or (0.0, 0.0)
    assert (gain, late) == (4.0, 0.25)
    law = ForecastLaw(-2.0, 0.5, 0.9, most_late=0.25, pairs=40)
    found = forecast_loss(law, STEPS, losses, 6.0)
    assert found is not None and (found.low, found.high) == (-2.0, 0.5)
    assert measure_multiple(late, gain, found.low) == law.low
    flat = forecast_loss(law, STEPS, np.full(8, 2.0), 6.0)
    assert flat is not None and flat.low == pytest.approx(-2.0 * 4.0 * FLOOR)


@pytest.mark.parametrize(
    ("losses", "base"),
    [(np.linspace(5, 4, 5), 6.0), (np.linspace(5, 4, 8), 3.9), (np.array([5.9] * 5 + [4.0] * 3), 6.0)],
    ids=["too few points", "never below its base", "later than any pair's"],
)
def test_there_is_no_forecast_where_nothing_is_known(losses: np.ndarray, base: float) -> None:
    assert forecast_loss(ForecastLaw(-2, 1, 0.9, 0.3, 40), np.arange(1, len(losses) + 1), losses, base) is None
