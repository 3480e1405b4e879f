"""Parts partition the rows, differences are paired, and rows that moved are ranked by what they moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from training_lens.data.examples import Example, Message
from training_lens.evaluation.comparison import (
    LengthBuckets,
    ModelComparison,
    choose_samples,
    compare_control,
    compare_models,
    measure_forgetting,
)
from training_lens.evaluation.evaluator import TokenSums
from training_lens.evaluation.model_scores import Bootstrap, ModelScores

ROWS = 60
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(10, 200, ROWS)
TOKENS = RNG.integers(1, 20, ROWS)
EXAMPLES = [
    Example((Message("user", "Q"), Message("assistant", "a")), "xyz"[i % 3], "rows.jsonl", i + 1) for i in range(ROWS)
]


def scored(loss: Any) -> ModelScores:
    answered = np.ones(ROWS, dtype=bool)
    rows = ModelScores(TokenSums(TOKENS * loss, TOKENS, TOKENS // 2), TOKENS * 4, np.arange(ROWS))
    return rows.with_answers(["a" if i % 4 else "" for i in range(ROWS)], ["a"] * ROWS, answered)


BASE_LOSS, ADAPTER_LOSS = np.full(ROWS, 2.0), np.linspace(0.5, 2.5, ROWS)


@pytest.fixture(scope="module")
def both() -> ModelComparison:
    models = {"base": scored(BASE_LOSS), "adapter": scored(ADAPTER_LOSS)}
    buckets = LengthBuckets.from_quantiles(LENGTHS, 4)
    return compare_models(EXAMPLES, LENGTHS, models, buckets, Bootstrap(200), {"base": "m", "adapter": "run"})


@pytest.mark.parametrize("parts", ["by_length", "by_domain"])
def test_parts_partition_the_rows_and_their_token_weighted_mean_is_the_whole(both: ModelComparison, parts: str) -> None:
    groups = getattr(both, parts).values()
    assert sum(g.rows for g in groups) == both.whole.rows == ROWS
    assert sum(g.supervised_tokens for g in groups) == both.whole.supervised_tokens
    for model in ("base", "adapter"):
        total = sum(g.models[model]["loss"] * g.supervised_tokens for g in groups)
        assert total / both.whole.supervised_tokens == pytest.approx(both.whole.models[model]["loss"], rel=1e-12)


def test_the_delta_is_adapter_minus_base_with_an_interval_around_it(both: ModelComparison) -> None:
    wanted = both.whole.models["adapter"]["loss"] - both.whole.models["base"]["loss"]
    low, high = both.whole.intervals["loss"]
    assert both.whole.delta["loss"] == pytest.approx(wanted) and low < wanted < high
    assert both.whole.delta["exact_match"] == 0.0 and both.whole.models["base"]["exact_match"] == 0.75


def test_the_most_improved_and_worsened_rows_are_the_ends_of_the_order(both: ModelComparison) -> None:
    assert [row.id for row in both.improved] == [f"rows.jsonl:{i}" for i in range(1, 6)]
    assert [row.id for row in both.worsened] == [f"rows.jsonl:{i}" for i in range(60, 55, -1)]
    assert all(row.adapter_loss > row.base_loss for row in both.worsened)


def test_rows_that_did_not_move_are_in_neither_list() -> None:
    same = {"base": scored(BASE_LOSS), "adapter": scored(BASE_LOSS)}
    result = compare_models(
        EXAMPLES, LENGTHS, same, LengthBuckets.from_limits([64]), Bootstrap(0), {"base": "m", "adapter": "r"}
    )
    assert not result.improved and not result.worsened


def test_one_model_has_intervals_of_its_own_and_no_delta() -> None:
    buckets = LengthBuckets.from_limits([64])
    alone = compare_models(
        EXAMPLES, LENGTHS, {"adapter": scored(ADAPTER_LOSS)}, buckets, Bootstrap(200), {"adapter": "run"}
    )
    low, high = alone.whole.intervals["loss"]
    assert low < alone.whole.models["adapter"]["loss"] < high
    found = alone.as_json()
    assert "delta" not in found and "base" not in found and found["adapter"]["loss"] > 0


def test_the_json_has_the_shape_that_the_design_gives(both: ModelComparison) -> None:
    found = both.as_json()
    assert {"base", "adapter", "delta", "by_length", "by_domain", "intervals", "controls"} <= found.keys()
    assert [part["rows"] for part in found["by_length"]] == [g.rows for g in both.by_length.values()]
    assert found["by_domain"]["x"]["delta"]["loss"] == pytest.approx(
        found["by_domain"]["x"]["adapter"]["loss"] - found["by_domain"]["x"]["base"]["loss"]
    )


def test_forgetting_is_the_change_on_other_text() -> None:
    forgot = measure_forgetting(scored(BASE_LOSS), scored(BASE_LOSS + 0.25), Bootstrap(100))
    assert forgot.delta == pytest.approx(0.25) and forgot.rows == ROWS
    assert forgot.interval == pytest.approx((0.25, 0.25))


def test_samples_show_each_domain_first() -> None:
    some = [EXAMPLES[i] for i in (0, 1, 3, 2)]  # x, y, x, z
    assert choose_samples(some, 3) == [0, 1, 3]
    assert choose_samples(some, 4) == [0, 1, 3, 2]
    assert choose_samples(some[:1], 3) == [0]


def test_measures_by_token_are_not_compared_across_different_tokens() -> None:
    other = replace(scored(ADAPTER_LOSS), tokens_id=np.arange(ROWS) + 1)
    models, buckets = {"base": scored(BASE_LOSS), "adapter": other}, LengthBuckets.from_limits([64])
    result = compare_models(EXAMPLES, LENGTHS, models, buckets, Bootstrap(20), {"base": "a", "adapter": "b"})
    assert not {"loss", "perplexity", "bits_per_token", "token_accuracy"} & result.whole.delta.keys()
    assert {"bits_per_byte", "exact_match"} <= result.whole.delta.keys() and result.improved == []


def test_a_control_is_held_against_the_adapter_on_the_same_rows() -> None:
    some = np.arange(10)
    found = compare_control(scored(ADAPTER_LOSS + 1.0).take(some), scored(ADAPTER_LOSS).take(some), Bootstrap(50))
    assert (found.rows, found.supervised_tokens) == (10, TOKENS[:10].sum())
    assert found.delta["loss"] == pytest.approx(1.0) and found.intervals["loss"] == pytest.approx((1.0, 1.0))
