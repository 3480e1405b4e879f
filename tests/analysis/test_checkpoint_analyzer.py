"""One object says all of a run; two runs whose relation is known are found to have it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training_lens import CheckpointAnalyzer
from training_lens.core.collector import AnalyzerRegistry
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.errors import ConfigurationError, LensError

NAME = "model.layers.0.self_attn.q_proj"
Saver = Callable[..., Path]


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def pair(left: Tensor, right: Tensor, rank: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of left diag(2, 1.5, ...) right^T, padded with zeros to a rank."""
    values = torch.linspace(2, 1.5, left.shape[1], dtype=torch.float64)
    padding = max(0, rank - left.shape[1])
    a = torch.cat([right.T, torch.zeros(padding, right.shape[0])])
    b = torch.cat([left * values, torch.zeros(left.shape[0], padding)], 1)
    return {NAME: (a.float(), b.float())}


def test_the_same_update_in_other_factors_has_no_angle(save_adapter: Saver) -> None:
    """Rotated, B Q and Q^T A, of another rank and another alpha."""
    left, right = orthonormal(12, 3, 0), orthonormal(9, 3, 1)
    turn = orthonormal(3, 3, 2).float()
    (a, b), (wide_a, wide_b) = pair(left, right)[NAME], pair(left, right, rank=5)[NAME]
    first = CheckpointAnalyzer(save_adapter("first", {NAME: (a, b)}))
    for name, factors in (("rotated", (turn.T @ a, b @ turn)), ("wide", (wide_a, wide_b))):
        likeness = first.compare(save_adapter(name, {NAME: factors}, lora_alpha=9)).modules[NAME]
        assert likeness.cosine == pytest.approx(1, abs=1e-6)
        assert len(likeness.columns) == len(likeness.rows) == 3
        assert (*likeness.columns, *likeness.rows) == pytest.approx([0] * 6, abs=1e-3)


def test_orthogonal_updates_are_at_right_angles(save_adapter: Saver) -> None:
    lefts, rights = orthonormal(12, 6, 0), orthonormal(9, 6, 1)
    first = save_adapter("first", pair(lefts[:, :3], rights[:, :3]))
    second = save_adapter("second", pair(lefts[:, 3:], rights[:, 3:]))
    likeness = CheckpointAnalyzer(first).compare(second).modules[NAME]
    assert likeness.cosine == pytest.approx(0, abs=1e-6)
    assert (*likeness.columns, *likeness.rows) == pytest.approx([math.pi / 2] * 6, abs=1e-3)


def test_rows_and_columns_are_told_apart(save_adapter: Saver) -> None:
    lefts, right = orthonormal(12, 6, 0), orthonormal(9, 3, 1)
    first = save_adapter("first", pair(lefts[:, :3], right))
    likeness = CheckpointAnalyzer(first).compare(save_adapter("second", pair(lefts[:, 3:], right))).modules[NAME]
    assert likeness.columns == pytest.approx([math.pi / 2] * 3, abs=1e-3)
    assert likeness.rows == pytest.approx([0] * 3, abs=1e-3)


def test_an_update_of_zero_has_no_direction(save_adapter: Saver) -> None:
    first = save_adapter("first", pair(orthonormal(12, 3, 0), orthonormal(9, 3, 1)))
    zero = save_adapter("zero", {NAME: (torch.ones(3, 9), torch.zeros(12, 3))})
    compared = CheckpointAnalyzer(first).compare(zero)
    assert math.isnan(compared.modules[NAME].cosine) and compared.modules[NAME].columns == ()
    assert json.loads(json.dumps(compared.values(), allow_nan=False))["modules"][NAME]["cosine"] is None


def test_modules_are_compared_in_the_models_order(trainer_output: Path) -> None:
    """Of unlike shapes too, which are stacked apart."""
    analyzer = CheckpointAnalyzer(trainer_output)
    likeness = analyzer.compare(analyzer)
    assert list(likeness.modules) == [module.name for module in analyzer.recording.modules]


def test_runs_that_cannot_be_compared_say_why(save_adapter: Saver) -> None:
    first = CheckpointAnalyzer(save_adapter("first", {NAME: (torch.ones(2, 9), torch.ones(12, 2))}))
    with pytest.raises(LensError, match=f"{NAME} is 12 x 9 in one and 12 x 8 in the other"):
        first.compare(save_adapter("narrow", {NAME: (torch.ones(2, 8), torch.ones(12, 2))}))
    with pytest.raises(LensError, match="no module in common"):
        first.compare(save_adapter("elsewhere", {"other": (torch.ones(2, 9), torch.ones(12, 2))}))
    both = save_adapter("both", {n: (torch.ones(2, 9), torch.ones(12, 2)) for n in (NAME, "other")})
    assert first.compare(both).only_second == ("other",)


def test_the_trainers_output_is_analysed(trainer_output: Path) -> None:
    analyzer = CheckpointAnalyzer(trainer_output)
    analysis = analyzer.analyze()
    assert set(analysis.results) == {"weights", "convergence", "similarity"}
    values = json.loads(json.dumps(analysis.values(), allow_nan=False))
    assert values["status"] == "finished" and values["results"]["weights"]["step"] == 6
    assert len(values["findings"]) == len(analysis.findings) > 0
    assert analyzer.similarity() == analysis.results["similarity"]
    assert analyzer.adapter(2).keys() == {module.name for module in analyzer.recording.modules}
    last = analyzer.adapter(6)
    assert all(torch.equal(factors.a, last[name].a) for name, factors in analyzer.adapter().items())


def test_evolution_is_that_of_the_tables(trainer_output: Path) -> None:
    analyzer = CheckpointAnalyzer(trainer_output)
    norms = analyzer.recording.series("adapter_weights", "norm_update")
    whole, kinds = analyzer.evolution("norm_update"), analyzer.evolution("adapter_weights.norm_update", by="kind")
    assert (whole.values == norms.values).all() and set(kinds.names) == {"q", "v", "down"}
    assert np.square(kinds.values).sum(1) == pytest.approx(np.square(norms.values).sum(1))
    assert analyzer.evolution("strength", by="layer").names == ("0", "1")
    assert not len(analyzer.evolution("gradient_norm").steps)
    with pytest.raises(
        ConfigurationError, match=r"'adapter_weights.norm_updat'. Did you mean 'adapter_weights.norm_update'"
    ):
        analyzer.evolution("adapter_weights.norm_updat")
    with pytest.raises(ConfigurationError, match="by: 'head'"):
        analyzer.evolution("norm_update", by="head")  # type: ignore[arg-type]


def test_one_snapshot_has_nothing_to_be_like(save_adapter: Saver) -> None:
    analyzer = CheckpointAnalyzer(save_adapter("adapter", {NAME: (torch.ones(2, 9), torch.ones(12, 2))}))
    with pytest.raises(LensError, match="has 1 snapshots"):
        analyzer.similarity()


def test_a_users_analyzer_takes_part_and_its_failure_ends_nothing(
    trainer_output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    AnalyzerRegistry.names()
    monkeypatch.setattr(AnalyzerRegistry, "_classes", dict(AnalyzerRegistry._classes))

    @AnalyzerRegistry.register
    class Counting(DataAnalyzer):
        name, needs, gives = "counting", frozenset(), ("modules",)

        def analyze(self, recording: Recording) -> dict[str, Any]:
            return {"modules": np.int64(len(recording.modules))}

    @AnalyzerRegistry.register
    class Failing(DataAnalyzer):
        name, needs, gives = "failing", frozenset(), ()

        def analyze(self, recording: Recording) -> dict[str, Any]:
            raise ValueError("no luck")

    analysis = CheckpointAnalyzer(trainer_output).analyze()
    assert analysis.values()["results"]["counting"] == {"modules": 6} and "failing" not in analysis.results
    assert "'failing' failed and is left out: no luck" in caplog.text
