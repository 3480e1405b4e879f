"""Test runs: what was planted is found, the run stays as it was, and one that does not repeat is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from training_lens import TrainingWrapper
from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
from training_lens.analysis.findings import Finding, Intervention, read_interventions
from training_lens.cli import cli
from training_lens.errors import ConfigurationError, TrainingError
from training_lens.runs.run_folder import RunFolder
from training_lens.training.counterfactuals import RunTests


@pytest.fixture(scope="module")
def train(
    small_config_in: Callable[..., Any], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunFolder]:
    """Trains a model so small that a step takes milliseconds: 12 steps of 8 rows an epoch."""

    def run(**sections: dict[str, Any]) -> RunFolder:
        sections = {"model": {"id": str(tiny_base)}, "data": {"max_examples": 96}, **sections}
        config = small_config_in(tmp_path_factory.mktemp("outputs"), lens={}, **sections)
        return RunFolder(Path(TrainingWrapper(config).train().run_dir))

    return run


@pytest.fixture(scope="module")
def slow_rate(train: Callable[..., RunFolder]) -> RunFolder:
    """A run at a tenth of a good rate."""
    return train(training={"lr": 3e-4, "epochs": 2})


def ask(run: RunFolder, question: Any, steps: int | None = None) -> Intervention:
    tests = RunTests(run)
    (found,) = tests.measure([tests.plan(question, steps)])
    return found


def find(run: RunFolder, code: str) -> Finding:
    return next(found for found in CheckpointAnalyzer(run.root).analyze().findings if found.code == code)


@pytest.mark.slow
def test_a_rate_ten_times_too_low_is_to_be_raised(slow_rate: RunFolder) -> None:
    before = {path: path.read_bytes() for path in slow_rate.root.rglob("*") if path.is_file()}
    found = ask(slow_rate, "rate")
    assert read_interventions(slow_rate.root) == {"rate": found}
    rate = find(slow_rate, "rate_low")
    assert (rate.severity, rate.confidence) == ("warning", "sure") and "training.lr=0.0009" in rate.action
    assert find(slow_rate, "rate_high").severity == "fine"
    changed = {path for path in slow_rate.root.rglob("*") if path.is_file()} - before.keys()
    assert changed == {slow_rate.lens / "interventions.json"}
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_unchanged_run_of_a_test_is_the_run_itself(slow_rate: RunFolder) -> None:
    """As long as the run and with its seed, it ends at the loss that the run recorded, to the last bit."""
    from training_lens.training.plan_runner import PlanRunner

    tests = RunTests(slow_rate)
    test = tests.plan("rate")
    assert test.steps == test.total_steps and test.seeds[0] == 0
    runner = PlanRunner(tests._plan)
    for _ in range(2):  # the base is as it was, whatever was trained around it
        nll = runner.train(tests._resize(tests._plan.config, test, 0), tests._validation)
        loss = float(nll.sum() / tests._validation.supervised_counts.sum())
        assert loss == slow_rate.read_metadata("summary.json")["validation_loss"]


@pytest.mark.slow
def test_modules_too_few_for_the_task_are_found(train: Callable[..., RunFolder]) -> None:
    few = {"data": {"max_examples": 48}, "peft": {"r": 1, "target_modules": ["o_proj"]}}
    run = train(model={"id": "embedded"}, **few)
    assert find(run, "targets").confidence == "inconclusive"
    ask(run, "targets")
    found = find(run, "targets")
    assert found.severity == "warning" and "peft.target_modules=auto" in found.action, found.measured
    assert list(RunTests(run).plan("rank").changes) == ["doubled"]  # there is no half of 1


@pytest.mark.slow
def test_one_more_epoch_starts_from_the_adapter_of_the_run(slow_rate: RunFolder) -> None:
    found = ask(slow_rate, "epoch")
    assert found.loss == pytest.approx(slow_rate.read_metadata("summary.json")["validation_loss"], rel=1e-6)
    assert find(slow_rate, "converged").title == "One more epoch lowers the loss"


@pytest.mark.slow
def test_the_command_says_the_cost_and_the_decided_finding(train: Callable[..., RunFolder]) -> None:
    run = train(training={"epochs": 1}, peft={"target_modules": ["o_proj"]})
    result = CliRunner().invoke(cli, ["analyze", str(run.root), "--test", "--test-steps", "6", "--json"])
    assert result.exit_code == 0, result.output
    told, text = json.loads(result.stdout), " ".join(result.stderr.split())
    assert "targets: 6 runs of 6 of 12 steps (peft.target_modules=auto)" in text
    (found,) = (each for each in told["findings"] if each["code"] == "targets")
    assert found["evidence"]["intervention"]["steps"] == 6


def test_a_plan_says_what_it_costs(slow_rate: RunFolder) -> None:
    tests = RunTests(slow_rate)
    whole, short = tests.plan("rate"), tests.plan("rate", 5)
    assert (whole.runs, short.steps, short.seeds) == (6, 5, (0, 1))
    assert "6 runs of 5 of 24 steps (training.lr=0.0009, training.lr=0.0001)" in short.describe_cost()
    assert short.tokens == pytest.approx(whole.tokens * 5 / 24, rel=0.01) and 0 < short.seconds < whole.seconds


@pytest.mark.slow
def test_a_run_that_does_not_repeat_is_not_tested(own_run: RunFolder) -> None:
    lines = [json.loads(line) for line in own_run.metrics_file.read_text().splitlines()]
    for line in lines:
        line.pop("crc", None)
        line["loss"] *= 1.01
    own_run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TrainingError, match=r"the loss of step 1 is .* it does not repeat"):
        ask(own_run, "rate", 4)
    assert not read_interventions(own_run.root)


def test_a_run_without_validation_rows_is_refused(text_run: RunFolder) -> None:
    with pytest.raises(ConfigurationError, match="compares losses on validation rows"):
        RunTests(text_run)


def test_seeds_and_lengths_change_neither_rows_nor_held_out_rows(slow_rate: RunFolder) -> None:
    tests = RunTests(slow_rate)
    test = tests.plan("rate", 6)
    one, two = (tests._resize(tests._plan.config, test, seed) for seed in test.seeds)
    orders = [[step.examples for step in plan.schedule.iterate_steps()] for plan in (one, two)]
    assert [len(order) for order in orders] == [6, 6] and not np.array_equal(orders[0][0], orders[1][0])
    own = list(tests._plan.schedule.iterate_steps())[:6]
    assert all(np.array_equal(a, b.examples) for a, b in zip(orders[0], own, strict=True))
    assert one.train is two.train and one.validation is two.validation
