"""A run in Python says what its folder says, while it trains and after, and shows text of data as text."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from training_lens import CheckpointAnalyzer, Run, TrainingWrapper
from training_lens.analysis.reports.technical import marked_steps
from training_lens.analysis.run_card import DIFFERENT_ROWS
from training_lens.core import table_names as tables
from training_lens.errors import CheckpointError, ConfigurationError, LensError
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.training.loop.callbacks import Callback
from training_lens.utils.files import read_json, write_json

EVIL = "<script>alert('x')</script>"


def lines(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.metrics_file) if line["kind"] == kind]


def drawings(html: str) -> list[ElementTree.Element]:
    """The drawings in a card: each is sound XML."""
    starts = [i for i in range(len(html)) if html.startswith("<svg", i)]
    return [ElementTree.fromstring(html[start : html.index("</svg>", start) + 6]) for start in starts]


@pytest.fixture
def copied(finished_run: Any, tmp_path: Path) -> RunFolder:
    """The finished run, to be changed."""
    place = runs_folder(str(tmp_path / "outputs"), "default") / finished_run.run_id
    shutil.copytree(finished_run.root, place)
    return RunFolder(place)


def test_metrics_are_the_lines_of_the_journal(finished_run: Any) -> None:
    metrics, steps = Run(finished_run.root).metrics, lines(finished_run, "step")
    for name in ("loss", "grad_norm", "lr", "tokens", "supervised_tokens", "seconds", "epoch", "finite"):
        assert metrics[name].dropna().to_dict() == {line["step"]: line[name] for line in steps}
    judged = [*lines(finished_run, "base"), *lines(finished_run, "validation")]
    assert metrics["validation_loss"].dropna().to_dict() == {line["step"]: line["loss"] for line in judged}
    assert judged[-1]["by_domain"] and all(
        metrics[f"validation_loss_{domain}"].dropna().to_dict()[judged[-1]["step"]] == loss
        for domain, loss in judged[-1]["by_domain"].items()
    )
    assert list(metrics.index) == list(range(len(steps) + 1)) and metrics.index.name == "step"


def test_a_line_that_a_kill_cut_short_and_a_loss_that_is_not_finite(copied: RunFolder) -> None:
    last = lines(copied, "step")[-1]
    broken = {**last, "step": last["step"] + 1, "loss": float("nan"), "finite": False}
    with copied.metrics_file.open("a") as file:
        file.write(f'{json.dumps(broken)}\n{{"kind": "step", "st')
    run = Run(copied.root)
    assert run.metrics.index[-1] == broken["step"]
    assert math.isnan(run.metrics["loss"].iloc[-1]) and not run.metrics["finite"].iloc[-1]
    assert drawings(run._repr_html_())


def test_samples_are_a_row_an_answer(copied: RunFolder) -> None:
    run = Run(copied.root)
    written = [line for line in read_metrics(copied.samples_file) if line.pop("time")]
    parts = [{"step": line["step"], "base": line["base"], **each} for line in written for each in line["samples"]]
    assert parts and run.samples.to_dict("records") == parts
    copied.samples_file.unlink()
    columns = ["step", "base", "id", "prompt", "expected", "generated"]
    assert list(run.samples.columns) == [*columns, "ended", "loops"] and run.samples.empty
    answer = {"id": "rows:3", "prompt": "p", "expected": "e", "generated": "g"}
    copied.samples_file.write_text(json.dumps({"step": 5, "base": True, "samples": [answer, answer]}) + "\n")
    earlier = run.samples  # of a version that did not look at ends and loops
    assert earlier[columns].to_dict("records") == [{"step": 5, "base": True, **answer}] * 2
    assert earlier[["ended", "loops"]].isna().all(axis=None)


def test_config_summary_and_lens_are_those_of_the_folder(finished_run: Any) -> None:
    run = Run(finished_run.root)
    assert run.config.model_dump() == finished_run.read_metadata("config.json")
    assert run.summary == finished_run.read_metadata("summary.json")
    assert run.findings == CheckpointAnalyzer(finished_run.root).analyze().findings
    assert run.lens is run.lens and run.findings is run.findings
    assert repr(run).startswith(f"Run {run.run_id}: finished, {run.summary['steps']} steps, validation loss ")


def test_a_run_is_found_by_folder_id_and_as_the_latest(copied: RunFolder) -> None:
    base = copied.root.parents[3]
    (runs_folder(str(base), "empty")).mkdir(parents=True)
    for run in (Run(str(copied.root)), Run(copied.run_id, base), Run.latest(base), Run.latest(base, "default")):
        assert run.folder.root.samefile(copied.root)
    mistyped = f"{copied.run_id[:-1]}z"
    with pytest.raises(CheckpointError, match=f"no run '{mistyped}'.*Did you mean '{copied.run_id}'"):
        Run(mistyped, base)
    assert Run(copied.run_id[:-1], base).run_id == copied.run_id  # no other run's id begins so
    with pytest.raises(CheckpointError, match=r"fetch_to_read\(URL"):
        Run("s3://bucket/experiments/default/runs/mine")
    with pytest.raises(CheckpointError, match=r"no run in .* yet"):
        Run.latest(base, "empty")
    with pytest.raises(ConfigurationError, match=r"no experiment 'defalt'.*Did you mean 'default'"):
        Run.latest(base, "defalt")


class Onlooker(Callback):
    """Opens the run from within its own loop, as another process would."""

    def __init__(self, base: str) -> None:
        self._base = base
        self.run: Run | None = None
        self.seen: list[tuple[int, str, int, float]] = []

    def on_step_end(self, trainer: Any, report: Any) -> None:
        self.run = self.run or Run.latest(self._base)
        summary = self.run.summary
        self.seen.append((report.step, self.run.status, summary["steps"], self.run.metrics["loss"].iloc[-1]))
        if report.step == 2:
            assert f"Run {self.run.run_id}: running" in self.run._repr_html_()


@pytest.mark.slow
def test_a_run_that_goes_on_is_read_while_it_does(small_config: Callable[..., Any]) -> None:
    config = small_config(data={"max_examples": 24}, lens={})
    onlooker = Onlooker(config.output.base_output_dir)
    TrainingWrapper(config, callbacks=(onlooker,)).train()
    assert onlooker.run is not None
    losses = onlooker.run.metrics["loss"].dropna()
    assert onlooker.seen == [(step, "running", step, loss) for step, loss in losses.items()]
    assert onlooker.run.status == onlooker.run.lens.recording.status == "finished"
    assert onlooker.run.findings == Run(onlooker.run.folder.root).findings


def test_a_run_without_captures_shows_its_losses_and_says_why_there_are_no_findings(copied: RunFolder) -> None:
    for folder in (copied.lens, copied.checkpoints, copied.adapter):
        shutil.rmtree(folder)
    run = Run(copied.root)
    with pytest.raises(LensError, match="has nothing to analyse"):
        _ = run.lens
    html = run._repr_html_()
    assert "No findings: the run" in html and len(drawings(html)) == 1
    assert [trace.name for trace in run.figure().data][:2] == ["training", "validation"]


def test_a_run_that_has_only_begun_is_shown(copied: RunFolder) -> None:
    shutil.rmtree(copied.lens)
    shutil.rmtree(copied.checkpoints)
    shutil.rmtree(copied.adapter)
    copied.metrics_file.unlink()
    write_json(copied.metadata / "summary.json", {"status": "running"})
    run = Run(copied.root)
    assert run.status == "interrupted" and run.metrics.empty  # nothing holds its lock
    assert "No step has finished yet." in run._repr_html_() and repr(run).endswith("interrupted, 0 steps")


def test_figures_and_reports_mark_the_checkpoints_that_the_run_has(copied: RunFolder) -> None:
    def marked() -> list[int]:
        return marked_steps(CheckpointAnalyzer(copied.root).recording)

    (copied.checkpoints / "step-00000003").mkdir()
    steps = sorted(read_json(path)["step"] for path in copied.checkpoints.glob("*/manifest.json"))
    figure = Run(copied.root).figure()
    triangles = next(trace for trace in figure.data if trace.name == "checkpoint")
    assert list(triangles.x) == marked() == sorted([3, *steps])
    shutil.rmtree(copied.checkpoints)
    assert marked() == CheckpointAnalyzer(copied.root).recording.captures.snapshot_steps(tables.SNAPSHOTS)


def test_figure_shows_each_loss_of_the_journal(finished_run: Any) -> None:
    figure = Run(finished_run.root).figure()
    training = next(trace for trace in figure.data if trace.name == "training")
    assert list(training.x) == [line["step"] for line in lines(finished_run, "step")]
    assert np.allclose(training.y, [line["loss"] for line in lines(finished_run, "step")])


def test_a_card_is_small_and_text_of_data_stays_text(copied: RunFolder) -> None:
    config = copied.read_metadata("config.json")
    config["model"]["id"] = EVIL
    copied.write_metadata("config.json", config)
    run = Run(copied.root)
    for html in (run._repr_html_(), run.compare(copied.root)._repr_html_()):
        assert "<script" not in html and len(html) < 30_000
    assert "&lt;script&gt;" in run._repr_html_()


@pytest.fixture
def other(copied: RunFolder) -> RunFolder:
    """A second run beside the first: another rank, another loss at the end."""
    place = RunFolder(copied.root.parent / "other")
    shutil.copytree(copied.root, place.root)
    config = place.read_metadata("config.json")
    config["peft"]["r"], config["output"]["run_id"] = 2, "other"
    place.write_metadata("config.json", config)
    write_json(place.metadata / "summary.json", {**place.read_metadata("summary.json"), "validation_loss": 1.5})
    return place


def test_compared_runs_show_what_differs_and_both_losses(copied: RunFolder, other: RunFolder) -> None:
    first = Run(copied.root)
    rank = first.config.peft.r
    for comparison in (first.compare("other"), first.compare(other.root), first.compare(Run(other.root))):
        assert comparison.config == {"peft.r": (rank, 2)}
    table = comparison.metrics
    assert list(table.columns) == [copied.run_id, "other"]
    assert table.loc["validation_loss"].tolist() == [first.summary["validation_loss"], 1.5]
    names = [f"{name} {kind}" for name in (copied.run_id, "other") for kind in ("training", "validation")]
    assert [trace.name for trace in comparison.figure().data] == names
    html = comparison._repr_html_()
    assert "peft.r" in html and "1.5000" in html and DIFFERENT_ROWS not in html
    assert [text.text for text in drawings(html)[0].iter() if text.text in names] == names
    assert repr(comparison) == f"RunComparison of {copied.run_id} and other: they differ in peft.r"


def test_runs_validated_on_other_rows_are_not_compared_silently(copied: RunFolder, other: RunFolder) -> None:
    data = other.read_metadata("data.json")
    data["validation"]["files"] = {"elsewhere.jsonl": "0" * 64}
    other.write_metadata("data.json", data)
    comparison = Run(copied.root).compare("other")
    assert not comparison.same_validation and DIFFERENT_ROWS in comparison._repr_html_()


def test_a_run_whose_metadata_are_broken_is_not_compared(copied: RunFolder, other: RunFolder) -> None:
    (other.metadata / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"other/metadata/config.json differs from the sha256"):
        Run(copied.root).compare("other")


def test_a_run_has_its_id_wherever_it_is_and_however_it_is_named(
    copied: RunFolder, other: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = copied.root.parents[3]
    monkeypatch.chdir(copied.root)
    assert Run(".").run_id == copied.run_id and repr(Run(".").compare("other")).endswith("peft.r")
    monkeypatch.chdir(copied.logs)
    assert (run := Run("..")).run_id == copied.run_id
    monkeypatch.chdir(base)
    assert run.status == "finished" and f">{copied.root.relative_to(base)}</td>" in run._repr_html_()
    monkeypatch.chdir(copied.root.parent)
    assert Run("other").compare(copied.run_id).config.keys() == {"peft.r"}
    moved = shutil.copytree(other.root, base.parent / "moved")
    assert Run(moved, base).compare(copied.run_id).config.keys() == {"peft.r"}


def test_runs_of_one_id_are_told_apart_by_their_folders(copied: RunFolder, finished_run: Any) -> None:
    names = Run(copied.root).compare(finished_run.root).run_names
    assert names == (str(copied.root), str(finished_run.root))


def test_a_training_that_ended_shows_its_run(small_config: Callable[..., Any], copied: RunFolder) -> None:
    from training_lens.training.summary import TrainingSummary

    summary = TrainingSummary(**copied.read_metadata("summary.json") | {"run_dir": str(copied.root)})
    assert summary._repr_html_() == Run(copied.root)._repr_html_()
    shutil.rmtree(copied.root)
    assert summary._repr_html_() is None
