"""A drawing shows every curve inside of its axes, whatever the values are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from training_lens.display.svg import LEFT, MOST_POINTS, PLOT_HEIGHT, TOP, WIDTH, Curve, axis_ticks, render_chart


def curve(values: list[float] | np.ndarray, name: str = "loss", **look: bool) -> Curve:
    return Curve(name, np.arange(len(values)), np.asarray(values, float), "#123456", **look)


def lines_of(svg: str) -> list[str]:
    """The paths of curves, without those of the legend."""
    paths = [e.attrib for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("path")]
    return [path["d"] for path in paths if path.get("fill") == "none"]


def points_of(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path)]


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [5.0], [2.0, 2.0], [1e-9, 1e9], [-3.0, 4.0]])
def test_points_lie_inside_of_the_axes(values: list[float]) -> None:
    (path,) = lines_of(render_chart([curve(values)], "step", "loss"))
    points = points_of(path)
    assert len(points) == len(values)
    assert all(LEFT <= x <= WIDTH and TOP <= y <= PLOT_HEIGHT for x, y in points)
    heights = [y for _, y in points]
    assert np.array_equal(np.argsort(values, stable=True), np.argsort(-np.array(heights), stable=True))


def test_a_gap_where_a_value_is_not_finite() -> None:
    (path,) = lines_of(render_chart([curve([1, 2, np.nan, 3, np.inf, 4, 5])], "step", "loss"))
    assert re.findall("[ML]", path) == ["M", "L", "M", "M", "L"]


def test_nothing_finite_draws_nothing() -> None:
    assert render_chart([curve([np.nan])], "step", "loss") == render_chart([], "step", "loss") == ""


def test_long_curves_stay_small_and_keep_their_extremes() -> None:
    values = np.sin(np.arange(100_000.0))
    values[[777, 55_555]] = 9, -9
    svg = render_chart([curve(values)], "step", "loss")
    (path,) = lines_of(svg)
    heights = [y for _, y in points_of(path)]
    assert len(heights) <= MOST_POINTS and len(svg) < 10_000
    assert min(heights) == pytest.approx(TOP, abs=0.1) and heights.count(min(heights)) == 1


def test_names_are_text() -> None:
    svg = render_chart([curve([1, 2], "<script>")], "<b>", "loss")
    assert "<script>" not in svg and "&lt;script&gt;" in svg and "&lt;b&gt;" in svg


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.36, 10.7), (-0.5, 0.5), (1e-7, 3e-7), (0, 123_456)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = axis_ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_marked_points_are_rings_without_a_line() -> None:
    svg = render_chart([curve([1, 2, 3]), curve([np.nan, 2, np.nan], "chosen", is_marked=True)], "step", "loss")
    rings = [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("circle")]
    assert len(lines_of(svg)) == 1 and len(rings) == 2  # at the point and in the legend
