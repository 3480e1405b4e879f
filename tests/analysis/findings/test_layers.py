"""A layer that leaves its siblings and its past is named; layers that always differ, or all move, are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from training_lens.analysis.findings import Finding

Find = Callable[..., Finding]


def scaled(run: Any, by: np.ndarray | float, module: int | slice, since: int = 120) -> None:
    for measure in ("norm_a", "norm_b"):
        run.values("adapter_gradients", measure)[since:, module] *= by


def test_a_module_whose_gradients_explode_is_named(finding: Find, healthy: Any) -> None:
    scaled(healthy, 1000.0, 5)
    found = finding("layers", healthy)
    assert (found.severity, found.title, found.evidence["modules"]) == (
        "problem", "Exploding layer", [healthy.modules[5].name],
    )  # fmt: skip
    assert found.evidence["step"] == 121 and 300 < found.evidence["factor"] < 3000


def test_a_module_whose_gradients_vanish_is_named(finding: Find, healthy: Any) -> None:
    for by in (1e-3, 0.0):
        scaled(healthy, by, 7)
        found = finding("layers", healthy)
        assert found.title == "Vanishing layer" and found.evidence["modules"] == [healthy.modules[7].name]


def test_so_is_one_whose_steps_do(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_weights", "norm_step")[60:, 2] *= 500
    found = finding("layers", healthy)
    assert found.evidence["measure"] == "step ratio" and found.evidence["modules"] == [healthy.modules[2].name]


def test_a_module_that_differs_from_the_start_is_not_accused(finding: Find, healthy: Any) -> None:
    scaled(healthy, 1000.0, 5, since=0)
    assert finding("layers", healthy).severity == "fine"


def test_what_all_modules_do_together_is_no_layers_matter(finding: Find, healthy: Any) -> None:
    scaled(healthy, 1000.0, slice(None))
    assert finding("layers", healthy).severity == "fine"


def test_a_spike_of_one_step_is_not_accused(finding: Find, healthy: Any) -> None:
    healthy.values("adapter_gradients", "norm_b")[120, 5] *= 1e6
    assert finding("layers", healthy).severity == "fine"


def test_growth_by_a_factor_of_ten_is_not_accused(finding: Find, healthy: Any) -> None:
    scaled(healthy, np.geomspace(1, 10, 80)[:, None], slice(5, 6))
    assert finding("layers", healthy).severity == "fine"


def test_too_few_of_a_kind_decide_nothing(finding: Find, healthy: Any) -> None:
    healthy.modules = tuple(m for m in healthy.modules if m.layer in (0, 1, 2))
    for name in ("adapter_weights", "adapter_gradients", "base_weights", "optimizer_state", "spectra"):
        steps, columns = healthy.tables[name]
        healthy.tables[name] = (steps, {measure: values[:, :6] for measure, values in columns.items()})
    found = finding("layers", healthy)
    assert found.confidence == "inconclusive" and "at most 3 modules of one type" in found.measured


def test_a_module_that_stays_while_its_siblings_fade_does_not_explode(finding: Find, healthy: Any) -> None:
    """As where a rate that is far too high has saturated all the others."""
    for module in range(len(healthy.modules)):
        if module != 5:
            scaled(healthy, 1e-3, module)
    assert finding("layers", healthy).title != "Exploding layer"


def test_a_smaller_departure_is_not_fine_either(finding: Find, healthy: Any) -> None:
    scaled(healthy, 20.0, 5)
    found = finding("layers", healthy)
    assert found.confidence == "inconclusive" and healthy.modules[5].name in found.measured


def test_an_end_without_captures_is_not_fine(finding: Find, healthy: Any) -> None:
    """As where the interval between captures has grown."""
    for name in ("adapter_weights", "adapter_gradients"):
        steps, columns = healthy.tables[name]
        kept = (steps <= 20) | (steps == 100)
        healthy.tables[name] = (steps[kept], {measure: values[kept] for measure, values in columns.items()})
    found = finding("layers", healthy)
    assert found.confidence == "inconclusive" and "lens.scalars_every=1" in found.decide
