"""What a sweep leaves behind: best.yaml is read back as it was, importances only where losses differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import create_trial

from training_lens.config.compose import compose, validate_values
from training_lens.config.schema import TrainingConfig
from training_lens.sweeps.leaderboard import (
    MOST_BLOCKS,
    Leaderboard,
    Recommendation,
    TrialRow,
    compute_importances,
    paired_interval,
    recommend_trial,
    sum_blocks,
)
from training_lens.sweeps.space import Space
from training_lens.sweeps.sweep_report import best_yaml

BEST = TrialRow(0, "finished", 1.0, {"peft.r": 4}, 1.0, "trial-0000-abcd", None, None)


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"revision": "1e5"}},
        {"model": {"revision": "12e45"}},
        {"model": {"revision": "no"}},
        {"data": {"train": ["a/${b}/c.jsonl", r"d\${e}.jsonl", "f\\\\${g}.jsonl"]}},
        {"peft": {"target_modules": r".*layers\.[0-3]\..*_proj$"}},
        {"training": {"max_grad_norm": None, "lr": 1e-05}},
        {"sweep": {"name": "a model: {id: evil}"}},
    ],
)
def test_the_best_config_is_read_back_as_it_was(tmp_path: Path, values: dict[str, Any]) -> None:
    sweep = {"space": {"peft.r": [2, 4]}, **values.get("sweep", {})}
    data = {"train": "x.jsonl", "validation": "y.jsonl", **values.get("data", {})}
    config = validate_values({**values, "data": data, "sweep": sweep})
    file = tmp_path / "best.yaml"
    file.write_text(
        best_yaml(Leaderboard(config.sweep.name, "validation_loss", (BEST,), {}), Recommendation(BEST, "so"), config)
    )
    wanted = config.replace_keys(peft={"r": 4}, sweep={"space": {}, "name": "sweep"})
    assert compose(str(file)).model_dump() == wanted.model_dump()


def test_there_are_no_importances_where_all_losses_are_equal(sweep_config: Callable[..., TrainingConfig]) -> None:
    space = Space.from_config(sweep_config(space={"peft.r": [2, 4, 8, 16]}))

    def trials(losses: list[float]) -> list[Any]:
        points = zip(space.list_points(), losses, strict=True)
        return [create_trial(params=p, distributions=space.distributions(), value=loss) for p, loss in points]

    assert compute_importances(trials([1.0] * 4)) == {}
    assert compute_importances(trials([1.0, 2.0, 3.0, 4.0])) == {"peft.r": 1.0}


def board_of(*losses: float | None, default: int | None = 0) -> tuple[Leaderboard, list[Any]]:
    """A sweep's trials on 40 validation rows of 10 tokens, whose losses differ; None: a trial that failed."""
    noise = np.random.default_rng(0).normal(0, 1, (len(losses), 40))
    rows, trials = [], []
    for number, loss in enumerate(losses):
        state = "failed" if loss is None else "finished"
        rows.append(
            TrialRow(number, state, loss, {"peft.r": number}, 1.0, "", None, None, is_default=number == default)
        )
        blocks = None if loss is None else sum_blocks(10 * loss + noise[number] - noise[number].mean())
        trials.append(create_trial(value=loss or 0.0, user_attrs={"continues": number, "block_nll": blocks}))
    return Leaderboard("s", "validation_loss", tuple(sorted(rows, key=lambda r: r.validation_loss or 9)), {}), trials


@pytest.mark.parametrize(
    ("losses", "trial", "reason"),
    [
        ((1.0, 0.5, 0.7), 1, "changes the default settings' loss by -0.5000 (95% interval -0."),
        ((1.0, 0.999, 1.2), 0, "which is within noise (95% interval -0."),
        ((1.0, 1.2, 1.3), 0, "no trial is better than the default settings"),
        ((None, 1.2, 1.1), 2, "the default settings (trial 0) are failed: it is unknown"),
    ],
)
def test_what_does_not_beat_the_default_settings_is_not_recommended(
    losses: tuple[float | None, ...], trial: int, reason: str
) -> None:
    chosen = recommend_trial(*board_of(*losses))
    assert chosen is not None and chosen.row.trial == trial and reason in chosen.reason
    assert chosen.as_json()["is_default"] == (trial == 0)


def test_a_study_of_an_earlier_version_recommends_its_best_trial() -> None:
    chosen = recommend_trial(*board_of(1.0, 0.999, default=None))
    assert chosen is not None and (chosen.row.trial, chosen.reason) == (1, "")
    assert recommend_trial(*board_of(None)) is None


def test_the_interval_of_a_paired_difference_holds_what_is_true() -> None:
    """Of 200 pairs that differ by 0.1 a token beside the noise of rows, the 95 % intervals hold it in about 190."""
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        row = draw.gamma(2, 10, 64)
        one, two = row + draw.normal(1.0, 2, 64), row + draw.normal(0.0, 2, 64)
        interval = paired_interval(float(one.sum()) / 640, sum_blocks(one), sum_blocks(two))
        assert interval is not None
        held += interval[0] <= 0.1 <= interval[1]
    assert 180 <= held <= 198


def test_blocks_keep_the_sum_and_are_few() -> None:
    nll = np.random.default_rng(2).gamma(2, 10, 1000)
    assert len(sum_blocks(nll)) == MOST_BLOCKS and sum(sum_blocks(nll)) == pytest.approx(nll.sum())
    assert sum_blocks(nll[:3]) == pytest.approx(nll[:3]) and paired_interval(1.0, [1.0], [2.0]) is None


def test_default_settings_are_a_point_where_the_space_has_them(sweep_config: Callable[..., TrainingConfig]) -> None:
    lr = {"low": 1e-4, "high": 1e-2, "log": True}
    space = Space.from_config(
        sweep_config(space={"training.lr": lr, "peft.r": [2, 4], "peft.target_modules": ["auto", ["q"]]})
    )
    values = {"training.lr": 3e-3, "peft.r": 4, "peft.target_modules": ["q"]}
    assert space.find_point(values) == {"training.lr": 3e-3, "peft.r": 4, "peft.target_modules": '["q"]'}
    for other in ({"training.lr": 1.0}, {"training.lr": None}, {"peft.r": 3}, {"peft.target_modules": ["k"]}):
        assert space.find_point({**values, **other}) is None
