"""The knob: known answers at its ends, a quadratic loss in closed form, and a chosen scale that all commands take."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training_lens.analysis.chosen_scale import choose_scale
from training_lens.analysis.knob_report import build_knob_report, knob_table
from training_lens.analysis.run_rows import RowOptions
from training_lens.analysis.scale_sweep import (
    Knob,
    KnobOptions,
    KnobPoint,
    _Measured,
    choose_point,
    find_optimum,
    measure_knob,
)
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.errors import ConfigurationError, DamagedFileError
from training_lens.evaluation.evaluator import TokenSums
from training_lens.evaluation.model_scores import Bootstrap, ModelScores
from training_lens.inference.session import open_run
from training_lens.merging.merge_tensors import merge_weights

ROWS = RowOptions(max_examples=12)
FEW = EvaluationSection(resamples=200, max_new_tokens=8)
IDS = torch.arange(40, 72).view(2, 16)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=IDS.to(model.device)).logits
    return result


@pytest.fixture(scope="module")
def run(finished_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the finished run, which has one checkpoint more: the adapter at half its scale."""
    copy = type(finished_run)(Path(shutil.copytree(finished_run.root, tmp_path_factory.mktemp("knob") / "run")))
    choose_scale(copy, 0.5)
    from training_lens.runs.checkpoint_format import write_checkpoint

    def fill(folder: Path) -> None:
        shutil.copytree(copy.served_adapter, folder / "adapter")

    write_checkpoint(copy.checkpoints, 1, None, "", fill)
    choose_scale(copy, 1)
    return copy


@pytest.fixture(scope="module")
def knob(run: Any) -> Knob:
    return measure_knob(run, ROWS, FEW, KnobOptions((0.5, 0.75), "exact_match"))


def test_the_ends_are_the_base_and_the_adapter(run: Any, knob: Knob) -> None:
    base, whole = knob.find("0"), knob.find("1")
    assert base is not None and whole is not None
    assert base.loss == knob.base_loss and base.change == 0 and base.kl == 0 and base.gain_kept == 0
    assert base.general_change == 0 and base.general_kl == 0
    assert whole.gain_kept == 1 and whole.kl > 0
    assert [point.name for point in knob.points] == ["0", "0.5", "0.75", "1", "step 1"]
    kl = [point.kl for point in knob.points if point.scale is not None]
    assert kl == sorted(kl)
    assert all(point.metric is not None for point in knob.points)


def test_a_checkpoint_is_measured_on_the_same_rows(knob: Knob) -> None:
    """Its adapter is the run's at scale 0.5, so all that is measured of it is that."""
    half, checkpoint = knob.find("0.5"), knob.find("step 1")
    assert half is not None and checkpoint is not None
    assert replace(checkpoint, name="0.5", scale=0.5, step=None) == half


@pytest.mark.slow
def test_the_cost_is_said_before_and_is_what_is_made(run: Any, knob: Knob) -> None:
    lines: list[str] = []
    measure_knob(run, ROWS, FEW, KnobOptions((1.0,), checkpoints=False), announce=lines.append)
    assert lines[0].startswith("3 passes over ") and knob.passes == 6


def test_the_report_has_every_point_in_every_form(run: Any, knob: Knob, tmp_path: Path) -> None:
    report, table = build_knob_report(knob), knob_table(knob)
    report.write_all(tmp_path, "knob", table)
    assert len(json.loads((tmp_path / "knob.json").read_text())["points"]) == len(knob.points)
    assert len((tmp_path / "knob.csv").read_text().splitlines()) == len(knob.points) + 1
    for name in ("knob.md", "knob.html"):
        assert "step 1" in (tmp_path / name).read_text()
    assert (tmp_path / "knob.html").read_text().count("<svg") == 3


def scores(nll: np.ndarray) -> ModelScores:
    rows = len(nll)
    tokens = np.full(rows, 2)
    sums = TokenSums(nll * tokens, tokens, np.zeros(rows, np.int64))
    return ModelScores(sums, tokens, np.arange(rows), kl=np.zeros(rows))


def test_a_quadratic_loss_has_its_optimum_in_closed_form() -> None:
    """Rows with the loss a + h/2 (s - c)^2: the mean's minimum is sum h c / sum h."""
    generator = np.random.default_rng(0)
    bend, center = generator.uniform(1, 2, 40), generator.normal(0.8, 0.1, 40)
    points = []
    for scale in (0.0, 0.5, 0.75, 1.0, 1.5):
        at = scores(3 + bend / 2 * (scale - center) ** 2)
        points.append(_Measured(f"{scale:g}", scale, None, at, at, None))
    best, interval = find_optimum(points, Bootstrap(400))
    assert best == pytest.approx((bend @ center) / bend.sum(), rel=1e-9)
    assert interval is not None and interval[0] < best < interval[1] and interval[1] - interval[0] < 0.2
    assert find_optimum(points[:3], Bootstrap(400)) == (None, None)  # the lowest is the last


def point(scale: float, gain_kept: float | None, kl: float, interval: tuple[float, float] = (-1.1, -0.9)) -> KnobPoint:
    return KnobPoint(f"{scale:g}", scale, None, 1.0, -1.0, interval, gain_kept, None, kl, None, 1.0, 0.0, None, 0.0)


def test_the_least_kl_that_keeps_most_of_the_gain_is_offered() -> None:
    points = [point(0, 0, 0), point(0.5, 0.94, 0.1), point(0.75, 0.96, 0.2), point(1, 1, 0.4), point(1.25, 0.97, 0.6)]
    assert choose_point(points)[0] == "0.75"
    assert choose_point([points[0], points[1], points[3]])[0] is None  # as trained is that point
    unsure = [point(0, 0, 0), point(0.5, 1.2, 0.1), point(1, 1, 0.4, (-0.1, 0.1))]
    offered, reason = choose_point(unsure)
    assert offered is None and "do not show" in reason


@pytest.mark.parametrize("scales", [(-0.1,), (float("nan"),), (11.0,)])
def test_a_scale_that_is_none_is_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match="is not from 0 to 10"):
        KnobOptions(scales).list_scales()


@pytest.mark.slow
def test_a_metric_that_there_is_not_is_refused_with_those_that_there_are(run: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"--metric nonsense: there are .*exact_match"):
        measure_knob(run, ROWS, FEW, KnobOptions((1.0,), "nonsense", checkpoints=False))


@pytest.mark.slow
def test_a_chosen_scale_answers_everywhere_and_is_taken_back(own_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    trained = logits(open_run(own_run).model)
    half = merge_weights(open_run(own_run, precision="fp32").model, 0.5)
    choose_scale(own_run, 0.5)
    assert own_run.adapter_scale == 0.5
    with caplog.at_level("INFO"):
        served = open_run(own_run, precision="fp32")
    assert "multiplied by 0.5" in caplog.text
    assert (logits(served.model) - logits(half.model)).abs().max() < 1e-4  # infer at a scale is the merge at it
    assert served.adapter == own_run.served_adapter != own_run.adapter
    choose_scale(own_run, 1)
    assert own_run.adapter_scale == 1 and torch.equal(logits(open_run(own_run).model), trained)


@pytest.mark.slow
def test_a_merge_and_a_push_take_the_chosen_scale(own_run: Any, tmp_path: Path) -> None:
    from training_lens.config.compose import validate_values
    from training_lens.integrations.hub_files import PathShortener, build_adapter_files
    from training_lens.integrations.record import RunRecord
    from training_lens.merging.merge_plan import MergeOptions
    from training_lens.merging.merge_run import merge_adapter

    choose_scale(own_run, 0.5)
    config = validate_values({"inference": {"adapter": str(own_run.root)}})
    report = merge_adapter(config, MergeOptions(tmp_path / "merged", dtype="fp32")).report
    assert report["verified"] and report["scale"] == 0.5
    record = RunRecord(own_run)
    sent = {file.path: file.source for file in build_adapter_files(record, PathShortener(record))}
    assert sent["adapter_model.safetensors"] == own_run.served_adapter / "adapter_model.safetensors"
    assert record.intact_adapter == own_run.served_adapter


def test_a_damaged_scaled_adapter_is_refused_and_repaired(own_run: Any) -> None:
    from training_lens.training.run_check import check_run

    choose_scale(own_run, 0.5)
    weights = own_run.served_adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(DamagedFileError, match="artifacts/scaled"):
        open_run(own_run)
    assert not {check.name: check.ok for check in check_run(own_run)}["scaled adapter"]
    list(check_run(own_run, repair=True))
    assert own_run.adapter_scale == 1 and not own_run.scaled.exists()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_choice_that_is_no_scale_is_refused(own_run: Any, scale: float) -> None:
    with pytest.raises(ConfigurationError, match="give a number above 0"):
        choose_scale(own_run, scale)
    assert own_run.adapter_scale == 1
