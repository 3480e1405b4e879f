"""Training by our kernels goes as training by the modules themselves: two curves no further apart than by rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_lens import embedded

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loss_curves(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import loss_curves  # type: ignore[import-not-found]

    return loss_curves


@pytest.mark.slow
def test_bf16_losses_of_200_steps_differ_no_more_than_rounding_moves_them(
    loss_curves: Any, shared: Path, tmp_path: Path
) -> None:
    steps = 200
    model, rows = shared / "models/tinystories-656k", embedded.PATHS[embedded.TRAIN]
    curves = loss_curves.measure(str(model), str(rows), steps, str(tmp_path))
    assert all(len(curve) == steps and np.isfinite(curve).all() for curve in curves.values())
    fused, cut, fp32 = (
        loss_curves.apart(curves[name], curves["plain"]) for name in ("fused", "plain_cut", "plain_fp32")
    )
    assert 0 < fused["smoothed"] <= 2 * max(cut["smoothed"], fp32["smoothed"]) < 0.02, (fused, cut, fp32)
    assert curves["fused"][-8:].mean() < curves["fused"][:8].mean()


def test_a_curve_that_drifts_away_is_told(loss_curves: Any) -> None:
    curve = np.linspace(3.0, 2.0, 40)
    drifting = curve * np.linspace(1.0, 1.1, 40)
    assert loss_curves.apart(curve, curve) == {"smoothed": 0.0, "step": 0.0}
    assert loss_curves.apart(drifting, curve)["step"] == pytest.approx(0.1)
    assert 0.06 < loss_curves.apart(drifting, curve)["smoothed"] < 0.1
