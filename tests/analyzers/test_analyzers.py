"""Analyzers give known answers for known captures, in plain values, and nothing for missing ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training_lens.analyzers import (
    ActivationAnalyzer,
    ConvergenceAnalyzer,
    GradientAnalyzer,
    LoRAAnalyzer,
    SimilarityAnalyzer,
)
from training_lens.analyzers.convergence_analyzer import smooth_series
from training_lens.config.lens_section import LensSection
from training_lens.core.collector import AnalyzerRegistry
from training_lens.core.lens_store import LensStore
from training_lens.core.lens_writer import LensWriter
from training_lens.core.modules import module_record
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.types import RUN, Captured, DataType, LensManifest, Series

NAMES = ("layers.0.q_proj", "layers.1.q_proj")
Write = Callable[..., Recording]
Rows = Iterable[tuple[str, int, Captured]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A recording of given rows, by way of a real store."""

    def build(rows: Rows, kinds: Mapping[str, DataType], **settings: Any) -> Recording:
        modules = tuple(module_record(name, (2, 6), (5, 2), 1.0) for name in NAMES)
        manifest = LensManifest(modules, tables=dict(kinds), settings=settings, probe={"tokens": 100})
        writer = LensWriter(tmp_path / "lens", manifest, LensSection())
        for table, step, captured in rows:
            writer.add(table, step, captured)
        writer.close()
        return Recording("made", tmp_path / "lens", manifest, LensStore(tmp_path / "lens"))

    return build


def of_modules(**measures: list[float]) -> Captured:
    return Captured({name: torch.tensor(values) for name, values in measures.items()}, rows=NAMES)


def of_run(**measures: float) -> Captured:
    return Captured({name: torch.tensor([value]) for name, value in measures.items()})


def read(analyzer: DataAnalyzer, recording: Recording) -> Any:
    """What it says, which is plain and exactly what it promises."""
    values = analyzer.analyze(recording)
    assert tuple(values) == analyzer.gives
    return json.loads(json.dumps(values, allow_nan=False))


def test_the_built_in_analyzers_are_known() -> None:
    assert {"weights", "gradients", "activations", "convergence", "similarity"} <= set(AnalyzerRegistry.names())


def test_weight_analysis_gives_sizes_shares_and_nonfinite_modules(write: Write) -> None:
    rows = [
        ("base_weights", 0, of_modules(norm=[10.0, 20.0])),
        ("adapter_weights", 1, of_modules(norm_update=[1.0, 1.0], norm_step=[0.1, 0.4], balance=[0.0, 1.0])),
        ("adapter_weights", 2, of_modules(norm_update=[3.0, 4.0], norm_step=[0.3, 0.8], balance=[0.5, 1.0])),
        ("spectra", 2, of_modules(effective_rank=[1.0, 2.0])),
    ]
    values = read(LoRAAnalyzer(), write(rows, dict.fromkeys(("adapter_weights",), DataType.ADAPTER_WEIGHTS)))
    assert values["step"] == 2 and values["share_by_layer"] == pytest.approx({"0": 9 / 25, "1": 16 / 25})
    assert values["share_by_kind"] == {"q": 1.0} and values["not_finite"] == []
    assert values["strength"]["most"] == pytest.approx(0.3) and values["strength"]["most_at"] == NAMES[0]
    assert values["step_ratio"]["most"] == pytest.approx(0.03)
    assert values["ranks"] == {"effective_rank": 1.5, "stable_rank": None, "energy_rank": None, "top_ratio": None}
    assert values["modules"][1]["norm_update"] == 4.0 and values["modules"][1]["layer"] == 1


def test_the_first_nonfinite_step_is_named(write: Write) -> None:
    norms = [[1.0, 1.0], [1.0, math.inf], [math.nan, math.nan]]
    rows = [("adapter_weights", i + 1, of_modules(norm_update=row)) for i, row in enumerate(norms)]
    values = read(LoRAAnalyzer(), write(rows, {"adapter_weights": DataType.ADAPTER_WEIGHTS}))
    assert values["not_finite"] == [{"module": NAMES[1], "step": 2}, {"module": NAMES[0], "step": 3}]
    assert values["modules"][0]["norm_update"] is None


def test_gradients_carry_the_certificate(write: Write) -> None:
    residuals = [[math.nan, 1e-7], [3e-7, 2e-7], [1e-8, 1e-7]]
    rows = [
        (
            "adapter_gradients",
            i + 1,
            of_modules(norm_a=[3.0, 1.5], norm_b=[4.0, 2.0], self_check=row, cosine_mean=[1, 0]),
        )
        for i, row in enumerate(residuals)
    ]
    values = read(GradientAnalyzer(), write(rows, {"adapter_gradients": DataType.ADAPTER_GRADIENTS}))
    assert values["certificate"] == {"largest": pytest.approx(3e-7), "module": NAMES[0], "step": 2, "checked": 5}
    assert values["steps"] == 3 and values["norm_by_layer"] == {"0": 5.0, "1": 2.5}
    assert values["norm_by_kind"]["q"] == pytest.approx(math.sqrt(31.25)) and values["not_finite"] == []
    assert values["directions"] == {
        "cosine_previous": {"run": None, "end": None},
        "cosine_mean": {"run": 0.5, "end": 0.5},
    }


def test_activation_analysis_gives_drift_kl_and_share(write: Write) -> None:
    layers = ("layers.0", "layers.1")
    rows = [
        ("activations", 4, Captured({"drift": torch.tensor([0.1, 0.2]), "cka": torch.tensor([1.0, 0.9])}, rows=layers)),
        *(("divergence", step, of_run(kl=0.1 * step)) for step in range(5)),
        ("lora_activations", 4, of_modules(share=[0.2, 0.4])),
    ]
    recording = write(rows, {"activations": DataType.ACTIVATIONS})
    values = read(ActivationAnalyzer(), recording)
    assert values["drift"] == pytest.approx({"layers.0": 0.1, "layers.1": 0.2}) and values["probe"] == {"tokens": 100}
    assert values["kl"]["steps"] == [0, 1, 2, 3, 4] and values["kl"]["values"][-1] == pytest.approx(0.4)
    assert values["share_by_kind"]["q"] == pytest.approx(0.3) and values["step"] == 4
    assert ActivationAnalyzer().can_read(recording)


def losses(count: int, slope: float, validations: int = 0, rate: Callable[[int], float] = lambda _: 1e-3) -> Rows:
    def at(step: float) -> float:
        return 3.0 + slope * math.log(step)

    yield from (("loss", step, of_run(loss=at(step), lr=rate(step))) for step in range(1, count + 1))
    yield from (
        ("evaluation", s, of_run(loss=at(s) + 1)) for s in np.linspace(1, count, validations).astype(int).tolist()
    )


@pytest.mark.parametrize(("validations", "of"), [(0, "training"), (5, "validation")])
def test_a_straight_line_has_its_slope_and_gain(write: Write, validations: int, of: str) -> None:
    kinds = {"loss": DataType.LOSS, "evaluation": DataType.LOSS}
    values = read(ConvergenceAnalyzer(), write(losses(100, -0.2, validations), kinds, total_steps=300))
    assert values["of"] == of and values["slope"]["value"] == pytest.approx(-0.2, rel=1e-4)
    assert values["until_step"] == 300 and values["remaining_gain"]["value"] == pytest.approx(
        0.2 * math.log(3), rel=1e-4
    )
    assert values["training"]["values"][50] == pytest.approx(3 - 0.2 * math.log(51), rel=1e-2)
    if validations:
        assert values["best_validation"] == values["last_validation"]
        assert values["best_validation"] == {"step": 100, "loss": pytest.approx(4 - 0.2 * math.log(100))}


def test_smoothing_ignores_a_spike_and_the_best_validation_is_the_lowest(write: Write) -> None:
    rows = [("loss", step, of_run(loss=90.0 if step == 150 else 2.0)) for step in range(1, 301)]
    rows += [("evaluation", 0, of_run(base_loss=5.0))]
    rows += [("evaluation", step, of_run(loss=abs(step - 200) / 100 + 1)) for step in (100, 200, 300)]
    values = read(ConvergenceAnalyzer(), write(rows, {"loss": DataType.LOSS}, total_steps=300))
    assert set(values["training"]["values"]) == {2.0} and len(values["training"]["steps"]) == 200
    assert values["best_validation"] == {"step": 200, "loss": 1.0} and values["last_validation"]["loss"] == 2.0
    assert values["base_loss"] == 5.0 and values["until_step"] == 600 and values["slope"]["value"] == pytest.approx(0)


@pytest.mark.parametrize(("validations", "of"), [(3, "training"), (4, "validation")])
def test_four_validations_are_enough_for_a_slope(write: Write, validations: int, of: str) -> None:
    kinds = {"loss": DataType.LOSS, "evaluation": DataType.LOSS}
    assert read(ConvergenceAnalyzer(), write(losses(40, -0.2, validations), kinds))["of"] == of


@pytest.mark.parametrize(("planned", "until"), [(101, 101), (100, 200), (None, 200)])
def test_the_gain_is_until_the_planned_end_or_for_twice_as_many_steps(
    write: Write, planned: int | None, until: int
) -> None:
    settings = {"total_steps": planned} if planned else {}
    values = read(ConvergenceAnalyzer(), write(losses(100, -0.2), {"loss": DataType.LOSS}, **settings))
    assert values["until_step"] == until
    assert values["remaining_gain"]["value"] == pytest.approx(0.2 * math.log(until / 100), rel=1e-3)


@pytest.mark.parametrize("rate", [lambda step: 1e-3 * (1 - step / 101), lambda _: math.nan])
def test_no_gain_is_told_from_a_curve_under_a_falling_or_an_unknown_rate(write: Write, rate: Any) -> None:
    values = read(ConvergenceAnalyzer(), write(losses(100, -0.2, rate=rate), {"loss": DataType.LOSS}))
    assert values["remaining_gain"] == {"value": None, "error": None} and values["slope"]["value"] is not None


@pytest.mark.parametrize(("spike", "smoothed"), [(3, {2.0}), (4, {2.0, 9.0})])
def test_the_smoothing_window_is_a_fiftieth_of_the_run(spike: int, smoothed: set[float]) -> None:
    """Of 300 steps, the odd seven: the median sees what lasts four of them."""
    losses = np.full(300, 2.0)
    losses[100 : 100 + spike] = 9.0
    assert set(smooth_series(Series(np.arange(1, 301), (RUN,), losses[:, None]), most=300).values[:, 0]) == smoothed


def test_the_slope_is_that_of_the_later_half(write: Write) -> None:
    rows = [("loss", step, of_run(loss=5.0 - step if step <= 10 else 3 - math.log(step))) for step in range(1, 21)]
    values = read(ConvergenceAnalyzer(), write(rows, {"loss": DataType.LOSS}))
    assert values["slope"]["value"] == pytest.approx(-1, rel=1e-4)


@pytest.mark.parametrize(("steps", "late"), [(30, 3), (9, 1)])
def test_the_end_of_the_directions_is_the_last_tenth(write: Write, steps: int, late: int) -> None:
    rows = []
    for step in range(1, steps + 1):
        cosine = float(step > steps - late)
        measures = of_modules(norm_a=[1.0, 1.0], norm_b=[1.0, 1.0], cosine_mean=[cosine, cosine])
        rows.append(("adapter_gradients", step, measures))
    values = read(GradientAnalyzer(), write(rows, {"adapter_gradients": DataType.ADAPTER_GRADIENTS}))
    assert values["directions"]["cosine_mean"] == {"run": 0.0, "end": 1.0}


def snapshot(step: int, turn: float) -> tuple[str, int, Captured]:
    """Rank-1 updates turned by an angle from the first axis, what they write and what they read."""
    a, b = torch.zeros(2, 6), torch.zeros(5, 2)
    a[0, :2] = b[:2, 0] = torch.tensor([math.cos(turn), math.sin(turn)])
    return (
        "adapters",
        step,
        Captured(tensors={f"{name}.{part}": x for name in NAMES for part, x in (("a", a), ("b", b))}),
    )


def test_similarity_to_the_last_snapshot_is_the_angle(write: Write) -> None:
    recording = write([snapshot(s, t) for s, t in ((1, math.pi / 2), (2, 0.3), (3, 0))], {})
    values = read(SimilarityAnalyzer(), recording)
    assert values["steps"] == [1, 2] and values["last"] == 3
    assert values["cosine"] == pytest.approx([0, math.cos(0.3) ** 2], abs=1e-6)
    assert values["columns"] == values["rows"] == pytest.approx([math.pi / 2, 0.3], abs=1e-6)
    assert values["modules"] == pytest.approx(dict.fromkeys(NAMES, 0), abs=1e-6)


def test_many_snapshots_are_compared_evenly(write: Write) -> None:
    recording = write([snapshot(step, 0.0) for step in range(1, 41)], {})
    steps = read(SimilarityAnalyzer(), recording)["steps"]
    assert len(steps) == 12 and (steps[0], steps[-1]) == (1, 39)


def test_missing_tables_are_not_analyzed_or_give_empty_values(write: Write) -> None:
    recording = write([("loss", 1, of_run(loss=1.0))], {"loss": DataType.LOSS})
    readable = {name for name in AnalyzerRegistry.names() if AnalyzerRegistry.get(name)().can_read(recording)}
    assert readable & {"weights", "gradients", "activations", "similarity", "convergence"} == {"convergence"}
    for analyzer in (LoRAAnalyzer(), GradientAnalyzer(), ActivationAnalyzer()):
        read(analyzer, recording)
    assert read(ConvergenceAnalyzer(), recording)["slope"] == {"value": None, "error": None}
    assert recording.series("loss", "loss").column(RUN).tolist() == [1.0]


def test_a_long_run_is_smoothed_at_few_steps_with_whole_windows() -> None:
    steps = np.arange(1, 50_001)
    short = smooth_series(Series(steps, (RUN,), steps[:, None].astype(float)), most=100)
    assert len(short.steps) == 100 and short.steps[[0, -1]].tolist() == [1, 50_000]
    assert short.values[50, 0] == short.steps[50]  # the median of a window of a straight line is its middle
