"""A run trained again without some rows: compared with itself and with random rows, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.errors import ConfigurationError
from training_lens.runs.run_folder import RunFolder
from training_lens.training.row_retraining import RetrainedLosses, RetrainingWithoutRows

Config = Callable[..., TrainingConfig]


def test_the_run_repeats_and_is_compared_with_random_rows(small_config: Config) -> None:
    run = RunFolder(Path(TrainingWrapper(small_config(training={"max_steps": 3})).train().run_dir))
    ids = [row_id for line in read_steps(run) for row_id in line[:2]]
    retraining = RetrainingWithoutRows(run, ids)
    assert retraining.describe_cost().startswith("4 replays of 3 of 3 steps")
    found = retraining.measure()
    assert found.whole == pytest.approx(run.read_metadata("summary.json")["validation_loss"], rel=1e-6)
    assert (found.left_out, found.rows, len(found.controls)) == (6, 24, 2) and found.without != found.whole
    assert found.as_json()["outcome"] in ("better", "worse", "inconclusive")
    with pytest.raises(ConfigurationError, match=r"no training row"):
        RetrainingWithoutRows(run, ["rows.jsonl:99"])


def read_steps(run: RunFolder) -> list[list[str]]:
    """The ids of the rows of each step."""
    from training_lens.runs.metrics_log import read_metrics

    return [line["example_ids"] for line in read_metrics(run.metrics_file) if line["kind"] == "step"]


@pytest.mark.slow
def test_a_run_without_validation_rows_is_refused(small_config: Config, few_rows: dict[str, list[str]]) -> None:
    config = small_config(data={"train": few_rows["train"]}, training={"max_steps": 1})
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    with pytest.raises(ConfigurationError, match="this run has none"):
        RetrainingWithoutRows(run, [read_steps(run)[0][0]])


@pytest.mark.parametrize(
    ("without", "controls", "difference", "outcome"),
    [(1.0, (1.2, 1.3), -0.25, "better"), (1.4, (1.2, 1.3), 0.15, "worse"), (1.25, (1.2, 1.3), 0.0, "inconclusive")],
)
def test_no_difference_within_chance_is_called_one(
    without: float, controls: tuple[float, float], difference: float, outcome: str
) -> None:
    found = RetrainedLosses(3, 10, 1.2, without, controls, difference, error=0.02)
    assert found.outcome == outcome and any(outcome in line.lower() for line in found.describe())
