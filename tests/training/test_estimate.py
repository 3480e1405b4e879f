"""An estimate is measured on the run's own steps, whole or thin, and leaves nothing behind."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from training_lens import embedded
from training_lens.errors import TrainingError
from training_lens.evaluation.evaluator import LossReport
from training_lens.training import estimate as estimates
from training_lens.training.estimate import estimate_run
from training_lens.training.loop.callbacks import Callback
from training_lens.training.run import TrainingWrapper
from training_lens.training.step_costs import (
    BUSY_FACTOR,
    BUSY_SHARE,
    LEAST_ERROR,
    StepPace,
    count_step_tokens,
    count_validated_tokens,
    describe_others,
    extrapolate_pace,
    measure_pace,
)


@pytest.mark.parametrize("samples", [0, 4])
def test_an_estimate_has_all_its_parts_and_writes_nothing(
    samples: int, small_config: Callable[..., Any], tmp_path: Path
) -> None:
    plan = TrainingWrapper(small_config(tracking={"samples": samples})).plan()
    before = sorted(tmp_path.rglob("*"))
    estimate = estimate_run(plan)
    assert estimate is not None and sorted(tmp_path.rglob("*")) == before
    assert estimate.seconds > 0 and estimate.validation_seconds > 0 and estimate.measured_steps >= 1
    assert estimate.peak_bytes > 4 * plan.parameters and estimate.layers == ()
    assert 0 <= estimate.seconds_low < estimate.seconds < estimate.seconds_high


@pytest.mark.slow
def test_more_steps_are_estimated_to_take_longer(small_config: Callable[..., Any]) -> None:
    once, often = (estimate_run(TrainingWrapper(small_config(training={"epochs": e})).plan()) for e in (1, 20))
    assert once is not None and often is not None and often.seconds > 4 * once.seconds


@pytest.mark.slow
def test_a_large_model_is_measured_thin(small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "SMALL_MODEL", 0)
    estimate = estimate_run(TrainingWrapper(small_config()).plan())
    assert estimate is not None and estimate.layers == (1, 3) and estimate.seconds > 0


def test_what_cannot_be_measured_is_said(
    small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(estimates, "SMALL_MODEL", 0)
    plan = TrainingWrapper(small_config()).plan()
    quantized = replace(plan, config=plan.config.replace_keys(model={"quantization": "4bit"}))
    last = replace(plan, config=plan.config.replace_keys(peft={"target_modules": r".*layers\.4\..*q_proj"}))
    with caplog.at_level(logging.WARNING, "training_lens"):
        assert estimate_run(quantized) is None and estimate_run(last) is None
    assert "no estimate of duration and memory: a large quantized model" in caplog.text
    assert "cannot be cut to 1 layers to be measured: peft.target_modules" in caplog.text


@pytest.mark.slow
def test_a_saved_adapter_of_a_large_model_is_measured_thin(
    small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TrainingWrapper(small_config(training={"max_steps": 1})).train()
    monkeypatch.setattr(estimates, "SMALL_MODEL", 0)
    plan = TrainingWrapper(small_config(peft={"from_adapter": first.run_dir})).plan()
    estimate = estimate_run(plan)
    assert estimate is not None and estimate.seconds > 0


@pytest.mark.slow
def test_a_first_step_that_is_not_finite_stops_the_estimate_as_the_run(
    small_config: Callable[..., Any], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(embedded.PATHS[embedded.MODEL], tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "model.norm.weight": torch.full((192,), torch.nan)}, model / "model.safetensors")
    wrapper = TrainingWrapper(small_config(model={"id": str(model)}))
    for use in (lambda: estimate_run(wrapper.plan()), wrapper.train):
        with pytest.raises(TrainingError, match=r"model\.norm\.weight holds 192 values of 192"):
            use()


@pytest.mark.slow
def test_a_learning_rate_that_diverges_is_no_reason_against_the_run(small_config: Callable[..., Any]) -> None:
    settings = {"lr": 1.0, "max_grad_norm": None, "epochs": 10, "warmup_ratio": 0.0}
    assert estimate_run(TrainingWrapper(small_config(training=settings)).plan()) is not None


# Room for a model and its threads, and not for one example beside it.
SHORT_OF_MEMORY = """
import resource, sys
from training_lens.cli import cli
import training_lens.training.run, training_lens.training.estimate, transformers, peft
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1_100_000_000,) * 2)
cli(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux alone")
@pytest.mark.slow
@pytest.mark.parametrize("command", ["validate", "train"])
def test_too_little_memory_is_said_with_what_to_lower(command: str, tmp_path: Path) -> None:
    shutil.copytree(embedded.PATHS[embedded.MODEL], tmp_path / "wide")
    wide = AutoConfig.from_pretrained(tmp_path / "wide", num_hidden_layers=1, intermediate_size=2**17)
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")  # 0.15 GB; a token keeps 1.6 MB
    rows = [json.dumps({"question": f"{i} " * 400, "answer": "b " * 100}) for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    settings = ["model.id=wide", "data.train=rows.jsonl", "training.batch_size=50", "training.precision=fp32"]
    settings += ["training.micro_batch_tokens=10000000"]
    result = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, command, *settings, "model.device=cpu"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    said = " ".join(result.stderr.split())
    assert result.returncode == 1 and "Traceback" not in said, said
    assert "the run does not fit into memory" in said and "lower training.micro_batch_tokens (now 10000000" in said


def test_step_tokens_cover_the_tokens(small_config: Callable[..., Any]) -> None:
    plan = TrainingWrapper(small_config()).plan()
    for step in plan.schedule.iterate_steps():
        assert count_step_tokens(plan, step, is_packed=False) >= int(plan.train.lengths[step.examples].sum())
    assert int(np.sum(plan.train.lengths)) == plan.count_rows_and_steps()["tokens"]


def test_the_pace_of_equal_steps_is_theirs_and_its_error_the_least() -> None:
    pace = measure_pace([2.0, 4.0, 6.0], [100, 200, 300])
    assert pace.seconds_per_token == pytest.approx(0.02) and pace.error == LEAST_ERROR
    assert pace.bounds(100.0) == pytest.approx((80.0, 120.0))


def test_an_interval_is_wider_where_other_programs_used_the_processor() -> None:
    quiet, busy = (measure_pace([2.0, 4.0, 6.0], [100, 200, 300], share) for share in (BUSY_SHARE, BUSY_SHARE + 0.01))
    assert quiet.bounds(100.0) == pytest.approx((80.0, 120.0))
    assert busy.bounds(100.0) == pytest.approx((100 / BUSY_FACTOR, 100 * BUSY_FACTOR))
    assert describe_others(BUSY_SHARE) == "" and describe_others(0.5) == (
        "other programs used 50% of the processor meanwhile"
    )
    whole = extrapolate_pace(quiet, busy, 3.0)
    assert whole.others_share == busy.others_share


def test_a_single_step_bounds_nothing() -> None:
    assert measure_pace([2.0], [100]).bounds(10.0) == (0.0, 20.0)


def test_the_interval_of_a_pace_holds_the_truth_as_often_as_it_says() -> None:
    random, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        tokens = random.integers(100, 1000, 5)
        seconds = tokens * 0.01 * (1 + random.normal(0, 0.3, 5))
        low, high = measure_pace(seconds.tolist(), tokens.tolist()).bounds(1.0)
        inside += low <= 0.01 / measure_pace(seconds.tolist(), tokens.tolist()).seconds_per_token <= high
    assert inside > 900


def test_paces_of_thin_models_are_extrapolated_with_their_errors() -> None:
    thin = StepPace(1.0, 0.1, 5), StepPace(2.0, 0.1, 4)
    pace = extrapolate_pace(*thin, further=3.0)
    assert pace.seconds_per_token == 4.0 and pace.error == pytest.approx(np.hypot(0.2, 0.6) / 4) and pace.steps == 4


@pytest.mark.slow
def test_a_run_says_what_it_expects_and_keeps_it_beside_what_came(
    small_config: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "training_lens"):
        summary = TrainingWrapper(small_config(training={"epochs": 2})).train()  # 12 steps
    expected = summary.estimate
    assert expected is not None and expected["step"] == 5 and caplog.text.count("the run will take about") == 1
    assert expected["seconds_low"] < expected["seconds"] < expected["seconds_high"]
    assert expected["validation_seconds"] > 0 and expected["peak_bytes"] > 0
    assert json.loads((Path(summary.run_dir) / "metadata/summary.json").read_text())["estimate"] == expected


@pytest.mark.slow
def test_a_run_of_a_few_steps_expects_nothing(small_config: Callable[..., Any]) -> None:
    assert TrainingWrapper(small_config(training={"max_steps": 5})).train().estimate is None


class ValidationCounter(Callback):
    """Counts the tokens of all validations of a run, and those of the sample."""

    def __init__(self) -> None:
        self.all_rows = self.samples = 0

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        self.all_rows += int(trainer.validation.lengths.sum())

    def on_evaluate_sample(self, trainer: Any, step: int, report: LossReport) -> None:
        self.samples += int(trainer.validation.lengths[trainer.validation_sample.positions].sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    "training", [{"epochs": 2, "max_steps": 8}, {"eval_steps": 3, "max_steps": 4}], ids=["with a sample", "without"]
)
def test_validations_are_counted_as_the_run_makes_them(
    small_config: Callable[..., Any], training: dict[str, Any]
) -> None:
    config = small_config(data={"max_examples": 240}, training={"batch_size": 24, **training})
    counter = ValidationCounter()
    TrainingWrapper(config, callbacks=(counter,)).train()
    assert count_validated_tokens(TrainingWrapper(config).plan()) == counter.all_rows + counter.samples
    assert (counter.samples > 0) == ("epochs" in training)
