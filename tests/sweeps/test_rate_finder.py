"""The learning-rate finder: its runs are those of `train`, its fit has known answers, and an edge is inconclusive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slow_cases import slow_but

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.errors import ConfigurationError
from training_lens.evaluation.evaluator import TokenSums
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.sweeps.rate_advice import RateLosses, advise_rate
from training_lens.sweeps.rate_finder import RateFinder, RateOptions, RateSearch, is_hopeless
from training_lens.sweeps.rate_report import describe_search

RATES = (1e-4, 1e-3, 1e-2)
STEPS = 4


@pytest.fixture(scope="module")
def config(
    small_config_in: Callable[..., Any], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainingConfig:
    outputs = tmp_path_factory.mktemp("rates") / "outputs"
    training = {"epochs": 1, "batch_size": 8, "lr": 1e-3}
    peft, model = {"r": 4, "lora_dropout": 0.1}, {"id": str(tiny_base)}
    config: TrainingConfig = small_config_in(outputs, training=training, peft=peft, model=model)
    return config


@pytest.fixture(scope="module")
def search(config: TrainingConfig) -> RateSearch:
    return RateFinder(config, RateOptions(steps=STEPS, rates=RATES)).search()


@pytest.mark.parametrize("place", slow_but([1], [0, 1, 2]))
def test_a_short_run_is_exactly_the_run_that_train_makes(
    config: TrainingConfig, search: RateSearch, place: int
) -> None:
    """Also the second and third, which start from the adapter and the random state that the first left behind."""
    ours = next(run for run in search.runs if run.seed == 0 and run.rate == RATES[place])
    own = config.replace_keys(training={"lr": RATES[place], "max_steps": STEPS})
    run = RunFolder(Path(TrainingWrapper(own).train().run_dir))
    lines = read_metrics(run.metrics_file)
    assert [line["loss"] for line in lines if line["kind"] == "step"] == list(ours.losses)
    (last,) = [line for line in lines if line["kind"] == "validation"]
    assert ours.held_out == pytest.approx(last["loss"], abs=1e-6)
    (base,) = [line for line in lines if line["kind"] == "base"]
    assert search.base_loss == pytest.approx(base["loss"], abs=1e-6)


def test_the_second_seed_starts_and_draws_differently_on_the_same_held_out_rows(search: RateSearch) -> None:
    first, second = ({run.rate: run for run in search.runs if run.seed == seed} for seed in (0, 1))
    assert second and set(second) <= set(first)
    assert all(second[rate].losses[0] != first[rate].losses[0] for rate in second)


def test_the_report_names_the_rate_that_the_best_one_is_compared_with(search: RateSearch) -> None:
    ended = max(run.rate for run in search.runs if run.held_out is not None)
    tried, between = (" ".join(describe_search(replace(search, default=ended * by))) for by in (1.0, 1.2))
    assert f"the one in the middle ({ended:g}, from" in tried
    assert f"{ended:g}, the nearest to {1.2 * ended:g}, from" in between


def losses(rates: np.ndarray, curve: np.ndarray, noise: float, rows: int = 400, seeds: int = 2) -> RateLosses:
    generator, tokens = np.random.default_rng(1), np.full(rows, 3)
    hard = generator.normal(0, 0.3, rows)  # of rows, the same at all rates

    def measure(loss: float) -> TokenSums:
        return TokenSums((loss + hard + noise * generator.standard_normal()) * tokens, tokens, tokens)

    return RateLosses(tuple(rates), tuple(tuple(measure(loss) for _ in range(seeds)) for loss in curve))


GRID = 1e-3 * 2.0 ** np.arange(-3, 4)
CURVE = 2 + 0.1 * (np.log(GRID) - np.log(1.5e-3)) ** 2


def test_the_minimum_of_a_parabola_is_advised_with_an_interval_that_holds_it() -> None:
    exact = advise_rate(losses(GRID, CURVE, 0.0), 1e-3, GRID, 2.0)
    assert exact.kind == "advised" and exact.rate == pytest.approx(1.5e-3)
    noisy = advise_rate(losses(GRID, CURVE, 0.01), 1e-3, GRID, 2.0)
    assert noisy.kind == "advised" and noisy.interval and noisy.interval[0] < 1.5e-3 < noisy.interval[1]
    assert noisy.seed_noise == pytest.approx(0.01, rel=0.9)


def test_the_interval_holds_the_minimum_as_often_as_it_says() -> None:
    found = []
    for seed in range(40):
        generator, tokens = np.random.default_rng(seed), np.full(50, 3)
        sums = [
            tuple(TokenSums((loss + 0.01 * generator.standard_normal()) * tokens, tokens, tokens) for _ in range(2))
            for loss in CURVE
        ]
        advice = advise_rate(RateLosses(tuple(GRID), tuple(sums)), 1e-3, GRID, 2.0)
        found.append(advice.interval is not None and advice.interval[0] <= 1.5e-3 <= advice.interval[1])
    assert np.mean(found) >= 0.85


@pytest.mark.parametrize("downwards", [False, True])
def test_a_best_rate_at_the_edge_is_inconclusive_and_names_the_next_grid(downwards: bool) -> None:
    slope = np.linspace(2, 1, 7)[:: -1 if downwards else 1]
    advice = advise_rate(losses(GRID, slope, 0.0), 1e-3, GRID, 2.0)
    assert advice.kind == "edge" and advice.rate is None
    beyond = min(advice.next_rates) < GRID[0] if downwards else max(advice.next_rates) > GRID[-1]
    assert beyond and min(advice.next_rates) <= advice.best <= max(advice.next_rates)


def test_a_best_rate_whose_neighbour_was_stopped_asks_for_a_finer_grid() -> None:
    ended = slice(0, 5)
    advice = advise_rate(losses(GRID[ended], np.linspace(2, 1, 5), 0.0), 1e-3, GRID, 2.0)
    assert advice.kind == "edge" and "was stopped" in advice.reason
    assert min(advice.next_rates) < advice.best < max(advice.next_rates) < 4 * advice.best


def test_noise_that_hides_the_minimum_is_inconclusive() -> None:
    flat = advise_rate(losses(GRID, 2 + 0.001 * (CURVE - 2), 0.05), 1e-3, GRID, 2.0)
    assert flat.kind != "advised"


def test_a_run_is_stopped_only_where_it_is_far_behind_beyond_the_noise() -> None:
    generator = np.random.default_rng(0)
    batches = 0.3 * generator.standard_normal(60)
    best = 3 - np.linspace(0, 1, 60) + batches
    assert is_hopeless(list(3 + batches[:25] + 0.01), list(best), 60)
    assert not is_hopeless(list(3 + batches[:10] + 0.01), list(best), 60)  # too early
    near = best + 0.05 + 0.1 * generator.standard_normal(60)
    assert not any(is_hopeless(list(near[:t]), list(best), 60) for t in range(1, 61))


@pytest.mark.parametrize("rates", [(1e-3, 2e-3), (0.0, 1e-3, 1e-2), (1e-3, 1e-3, 1e-3)])
def test_a_grid_that_is_none_is_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match="at least three learning rates"):
        RateOptions(rates=rates).list_rates(1e-3)
