"""Live findings of real runs: what is planted is raised and cleared once, and a sound run shows nothing."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from training_lens.analysis.findings import Finding
from training_lens.analysis.findings.live_checks import CHECKS
from training_lens.cli import cli
from training_lens.config.lens_section import FindingCode
from training_lens.config.schema import TrainingConfig
from training_lens.errors import TrainingError
from training_lens.runs.run_folder import RunFolder
from training_lens.training.live_findings import SPIKES
from training_lens.training.loop.callbacks import Callback
from training_lens.training.run import TrainingWrapper

Config = Callable[..., TrainingConfig]
LONG = {"epochs": 4, "batch_size": 4, "eval_steps": 12}  # 48 steps, four validations
SHORT = {"epochs": 2, "batch_size": 4, "eval_steps": 6}  # 24 steps, as many validations


def journal(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.findings_file.read_text(encoding="utf-8").splitlines()]


def train(config: TrainingConfig, *callbacks: Callback) -> RunFolder:
    return RunFolder(Path(TrainingWrapper(config, callbacks=callbacks).train().run_dir))


@pytest.fixture
def poisoned_rows(few_rows: dict[str, list[str]], write_rows: Callable[..., Path]) -> dict[str, list[str]]:
    """The first rows of the small set, and one of noise."""
    lines = Path(few_rows["train"][0]).read_text(encoding="utf-8").splitlines()[:47]
    garbage = "".join(chr(0x3A0 + 7 * i % 90) for i in range(60))
    rows = [*map(json.loads, lines), {"instruction": "zzz", "output": garbage, "domain": "noise"}]
    return {**few_rows, "train": [str(write_rows(rows))]}


class Listener(Callback):
    def __init__(self) -> None:
        self.heard: list[Finding] = []

    def on_finding(self, trainer: Any, finding: Finding) -> None:
        self.heard.append(finding)


def test_the_codes_that_may_stop_a_run_are_those_of_the_live_findings() -> None:
    answers = {"repetition", "endless_answers", "prompt_ignored"}
    checks = {__import__(check.__module__, fromlist=["RULE"]).RULE.code for check in CHECKS}
    assert set(typing.get_args(FindingCode)) == checks | set(SPIKES) | answers | {"nonfinite"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sound_run_raises_nothing(small_config: Config, seed: int) -> None:
    run = train(small_config(training={**LONG, "seed": seed}, lens={}))
    assert [line["code"] for line in journal(run)] == []


@pytest.mark.slow
def test_live_findings_change_no_bit_of_the_adapter(small_config: Config, poisoned_rows: dict[str, list[str]]) -> None:
    runs = [train(small_config(data=poisoned_rows, training=SHORT, lens={"live": live})) for live in (True, False)]
    first, second = ((run.adapter / "adapter_model.safetensors").read_bytes() for run in runs)
    assert first == second and not runs[1].findings_file.exists()


def test_stop_on_stops_the_run_and_saves_it(small_config: Config) -> None:
    config = small_config(model={"id": "embedded"}, training={**SHORT, "lr": 0.5}, lens={"stop_on": ["rate_high"]})
    summary = TrainingWrapper(config).train()
    run = RunFolder(Path(summary.run_dir))
    assert (summary.status, summary.stopped_by) == ("finished", "rate_high") and summary.steps < 24
    assert (run.adapter / "adapter_model.safetensors").is_file() and summary.adapter_step <= summary.steps
    assert journal(run)[-1]["event"] == "raised"


@pytest.mark.slow
def test_a_resumed_run_has_the_lines_of_one_that_did_not_stop(small_config: Config) -> None:
    class Fail(Callback):
        def on_step_end(self, trainer: Any, report: Any) -> None:
            if report.step == 15:
                raise RuntimeError

    training, lens = {**SHORT, "lr": 0.5}, {"scalars_every": 1, "probe_every": 4, "spectra_every": 8}
    sections: dict[str, Any] = {"model": {"id": "embedded"}, "training": training, "lens": lens}
    whole = train(small_config(**sections, output={"run_id": "whole"}))
    cut = small_config(**sections, output={"run_id": "cut"})
    with pytest.raises(RuntimeError):
        train(cut, Fail())
    resumed = RunFolder(Path(TrainingWrapper.resume(whole.root.parent / "cut").run_dir))
    ours, theirs = ([(line["step"], line["event"], line["code"]) for line in journal(run)] for run in (whole, resumed))
    assert ours == theirs and ours


@pytest.mark.slow
def test_the_command_says_that_a_finding_stopped_it_by_its_exit_code(few_rows: dict[str, Any], tmp_path: Path) -> None:
    keys = {
        "data.train": few_rows["train"], "data.validation": few_rows["validation"], "data.max_examples": 48,
        "training.lr": 0.5, "training.epochs": 2, "training.batch_size": 4, "training.eval_steps": 6, "peft.r": 4,
        "lens.stop_on": "[rate_high]", "lens.report": False, "tracking.tensorboard": False, "tracking.samples": 0,
        "output.base_output_dir": tmp_path,
    }  # fmt: skip
    found = CliRunner().invoke(cli, ["train", *(f"{key}={value}" for key, value in keys.items())])
    assert found.exit_code == 3 and "stopped by rate_high" in found.output


def test_a_value_that_is_not_finite_is_a_finding_of_the_run_that_stops(small_config: Config) -> None:
    class Poison(Callback):
        def on_step_end(self, trainer: Any, report: Any) -> None:
            trainer.parameters[0].data.fill_(float("nan"))

    listener = Listener()
    with pytest.raises(TrainingError, match="not finite"):
        train(small_config(training=SHORT, lens={}), Poison(), listener)
    assert [(finding.code, finding.severity) for finding in listener.heard] == [("nonfinite", "problem")]
