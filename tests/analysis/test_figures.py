"""Figures show the recording's numbers, keep what a person would look for, and say so where nothing was captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from training_lens.analysis.figures.catalogue import REPORT_FIGURES
from training_lens.analysis.figures.layer_figures import ActivationVisualizer
from training_lens.analysis.figures.run_figures import find_spikes, plot_cost, plot_loss
from training_lens.analysis.figures.style import match_scales, plot_heat_map
from training_lens.collectors.layer_activations import LayerStates, TokenPositions
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import ModuleRecord, Series
from training_lens.display.downsampling import thin_line, thin_rows, thin_steps
from training_lens.errors import LensError

Record = Callable[..., Recording]
FIGURES = {figure.name: figure for figure in REPORT_FIGURES}
STEPS = [1, 2, 3]
NORMS = np.arange(1.0, 16.0).reshape(3, 5)  # (steps, modules)


def _trace(figure: go.Figure, name: str) -> Any:
    return next(trace for trace in figure.data if trace.name == name)


def test_update_strength_is_the_median_of_each_layers_modules(record: Record) -> None:
    weights, base = {"norm_update": NORMS}, {"norm": np.full((1, 5), 10.0)}
    figure = FIGURES["update_strength"].draw(record({tables.WEIGHTS: (STEPS, weights), tables.BASE: ([0], base)}))
    heat = figure.data[0]
    assert list(heat.y) == ["0", "1", "outside"] and list(heat.x) == STEPS
    assert heat.z[0, 2] == pytest.approx((11 + 12) / 2 / 10)
    assert heat.z[2, 0] == pytest.approx(5 / 10)


def test_without_the_base_the_change_itself_is_drawn_and_said_so(record: Record) -> None:
    figure = FIGURES["update_strength"].draw(record({tables.WEIGHTS: (STEPS, {"norm_update": NORMS})}))
    assert figure.data[0].z[0, 0] == pytest.approx(np.hypot(1, 2))
    assert "unknown" in figure.data[0].colorbar.title.text


def test_kinds_are_lines_of_the_modules_of_all_layers(record: Record) -> None:
    gradients = {"norm_a": NORMS, "norm_b": 0 * NORMS, "cosine_mean": NORMS / 20}
    recording = record({tables.GRADIENTS: (STEPS, gradients)})
    norms = FIGURES["gradient_norm_by_kind"].draw(recording)
    assert _trace(norms, "q").y[0] == pytest.approx(np.hypot(1, 3))
    assert [trace.name for trace in norms.data] == ["q", "v", "lm_head"]
    assert _trace(FIGURES["gradient_cosine"].draw(recording), "v").y[2] == pytest.approx((12 + 14) / 2 / 20)


def test_gradients_are_coloured_by_their_power_of_ten_and_hover_shows_the_number(record: Record) -> None:
    norms = np.full((3, 5), 1e-3)
    norms[1] = 0.0
    recording = record({tables.GRADIENTS: (STEPS, {"norm_a": norms, "norm_b": 0 * norms})})
    heat = FIGURES["gradient_norm"].draw(recording).data[0]
    assert heat.z[2, 0] == pytest.approx(-3) and heat.z[2, 1] == pytest.approx(-3)
    assert heat.customdata[2, 1] == 0 and heat.customdata[0, 0] == pytest.approx(np.sqrt(2) * 1e-3)


def test_what_is_not_finite_is_marked_and_not_drawn_as_a_number(record: Record) -> None:
    norms = NORMS.copy()
    norms[1, 2], norms[2, 4] = np.nan, np.inf
    recording = record({tables.GRADIENTS: (STEPS, {"norm_a": norms, "norm_b": norms})})
    heat, crosses = FIGURES["gradient_norm"].draw(recording).data
    assert sorted(zip(crosses.x, crosses.y, strict=True)) == [(2, "1"), (3, "outside")]
    assert np.isnan(heat.z[1, 1]) and np.isnan(heat.z[2, 2])


def test_spectra_are_those_of_the_strongest_module_and_the_median_of_each_kind(record: Record) -> None:
    values = np.ones((2, 5, 4)) * [4.0, 2.0, 1.0, 0.5]
    values[:, 3] *= 3
    recording = record({tables.SPECTRA: ([1, 2], {"singular_values": values})})
    over_steps, at_end = (FIGURES[name].draw(recording) for name in ("spectrum", "spectrum_by_kind"))
    assert list(_trace(over_steps, "2.").y) == [6, 6]
    assert list(_trace(at_end, "v").y) == [1, 0.5, 0.25, 0.125]


def test_of_a_long_spectrum_twelve_lines_are_drawn_the_first_and_last_among_them(record: Record) -> None:
    values = np.ones((2, 5, 64)) * np.arange(64, 0, -1.0)
    figure = FIGURES["spectrum"].draw(record({tables.SPECTRA: ([1, 2], {"singular_values": values})}))
    assert len(figure.data) == 12 and [figure.data[0].name, figure.data[-1].name] == ["1.", "64."]


def test_balance_is_the_size_of_b_over_that_of_a(record: Record) -> None:
    figure = FIGURES["balance"].draw(record({tables.WEIGHTS: (STEPS, {"norm_a": 2 * NORMS, "norm_b": NORMS})}))
    assert list(_trace(figure, "lm_head").y) == [0.5, 0.5, 0.5]


def test_effective_rank_has_the_full_rank_as_its_brightest_colour(record: Record) -> None:
    figure = FIGURES["effective_rank"].draw(record({tables.SPECTRA: (STEPS, {"effective_rank": NORMS / 15})}))
    assert figure.data[0].zmax == 4 and figure.data[0].z[1, 0] == pytest.approx((3 + 4) / 2 / 15)


def test_layers_outputs_are_ordered_by_number(record: Record) -> None:
    rows = tuple(f"layers.{i}" for i in range(11))
    recording = record({tables.ACTIVATIONS: ([1], {"drift": np.arange(11.0)[None]})}, rows={tables.ACTIVATIONS: rows})
    heat = ActivationVisualizer(recording).drift().data[0]
    assert list(heat.y) == [str(i) for i in range(11)]
    assert heat.z[10, 0] == 10


def test_states_of_one_pass_are_drawn_over_layers() -> None:
    off = torch.ones(4, 3)
    positions = TokenPositions.from_mask(torch.ones(1, 4, dtype=torch.bool))
    shown = ActivationVisualizer(LayerStates((off, off), (off, 3 * off), positions))
    assert list(shown.drift().data[0].y) == [0, 2]
    assert list(_trace(shown.sizes(), "adapter on").y) == [1, 3]
    with pytest.raises(LensError, match="recording of a run"):
        shown.share()


def test_the_loss_shows_validation_its_best_the_base_checkpoints_and_epochs(record: Record) -> None:
    steps = np.arange(1, 21)
    judged = {"loss": [np.nan, 2.0, 1.5, 1.7], "base_loss": [3.0, np.nan, np.nan, np.nan]}
    recording = record(
        {tables.LOSS: (steps, {"loss": 3.0 - 0.1 * steps}), tables.EVALUATION: ([0, 5, 10, 15], judged)},
        settings={"steps_per_epoch": 10},
    )
    figure = plot_loss(recording, checkpoints=[10, 20])
    assert list(_trace(figure, "training").y) == pytest.approx(3.0 - 0.1 * steps)
    best = _trace(figure, "best validation")
    assert (best.x[0], best.y[0]) == (10, 1.5)
    assert list(_trace(figure, "checkpoint").x) == [10, 20]
    assert [shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1] == [10]
    assert [shape.y0 for shape in figure.layout.shapes if shape.y0 == shape.y1] == [3.0]


def test_a_spike_is_found_and_a_steep_fall_and_noise_are_none() -> None:
    steps = np.arange(1, 401)
    values = 2 + 3 * np.exp(-steps / 5) + 0.02 * np.random.default_rng(0).standard_normal(400)
    assert find_spikes(steps, values).size == 0
    values[200], values[300] = 9.0, np.nan
    assert list(find_spikes(steps, values)) == [201, 301]


def test_scatter_that_shrinks_with_the_loss_is_no_spike() -> None:
    """The noise of the first steps is far above that of the last in nats, and not in proportion."""
    steps = np.arange(1, 401)
    values = (9 * np.exp(-steps / 40) + 0.1) * np.random.default_rng(0).lognormal(0, 0.1, 400)
    assert find_spikes(steps, values).size == 0


def test_the_title_of_a_heat_maps_steps_keeps_clear_of_their_numbers(record: Record) -> None:
    drawn = FIGURES["update_strength"].draw(record({tables.WEIGHTS: (STEPS, {"norm_update": NORMS})}))
    assert drawn.layout.yaxis.type == "category" and drawn.layout.xaxis.title.standoff > drawn.layout.font.size


def test_a_loss_that_is_not_finite_has_a_cross_that_is_seen(record: Record) -> None:
    figure = plot_loss(record({tables.LOSS: ([1, 2, 3], {"loss": [3.0, 2.0, np.nan]})}))
    crosses = next(trace for trace in figure.data if trace.name == "spike")
    assert (list(crosses.x), list(crosses.y)) == ([3], [3.0])


def test_the_cost_is_a_bar_for_each_collector(record: Record) -> None:
    figure = plot_cost(record({}, cost={"spectra": 2.0, "flush": 0.5}))
    assert dict(zip(figure.data[0].y, figure.data[0].x, strict=True)) == {"spectra": 2.0, "flush": 0.5}


def test_a_recording_of_nothing_gives_figures_that_say_so(record: Record) -> None:
    empty = record({})
    drawn = [figure.draw(empty) for figure in REPORT_FIGURES] + [plot_loss(empty), plot_cost(empty)]
    assert all(not figure.data and figure.layout.annotations[0].text for figure in drawn)


def test_every_axis_has_a_title_and_every_figure_fits_its_page(record: Record) -> None:
    gradients = {"norm_a": NORMS, "norm_b": NORMS, "cosine_mean": NORMS}
    recording = record({tables.GRADIENTS: (STEPS, gradients)})
    figures = [figure.draw(recording) for figure in REPORT_FIGURES if recording.has(*figure.needs)]
    assert len(figures) == 3
    for figure in figures:
        assert figure.layout.xaxis.title.text == "step" and figure.layout.width is None
        assert figure.layout.yaxis.title.text or figure.data[0].colorbar.title.text


def test_a_module_named_as_markup_is_shown_as_text(record: Record) -> None:
    evil = "<a href='x'>layer</a>"
    of = (ModuleRecord(evil, None, evil, 4, 8, 8, 1.0),)
    recording = record({tables.GRADIENTS: ([1], {"norm_a": [[1.0]], "norm_b": [[1.0]]})}, of=of)
    assert _trace(FIGURES["gradient_norm_by_kind"].draw(recording), "&lt;a href=&#x27;x&#x27;&gt;layer&lt;/a&gt;")


def test_a_thinned_line_keeps_its_ends_its_extremes_and_what_is_not_finite() -> None:
    steps = np.arange(100_000)
    values = np.random.default_rng(0).standard_normal(100_000)
    values[[31_234, 71_235, 50_001]] = 99.0, -99.0, np.nan
    x, y = thin_line(steps, values)
    assert len(x) <= 1000 and (x[0], x[-1]) == (0, 99_999) and (np.diff(x) > 0).all()
    assert {31_234, 71_235, 50_001} <= set(x)
    assert np.array_equal(y, values[x], equal_nan=True)


def test_a_thinned_heat_map_keeps_the_largest_and_what_is_not_finite() -> None:
    values = np.zeros((3, 10_000))
    values[1, 4_321], values[2, 17] = 7.0, np.nan
    steps, thinned = thin_steps(np.arange(1, 10_001), values)
    assert thinned.shape == (3, 400) and steps[-1] == 10_000
    assert thinned[1].max() == 7 and np.isnan(thinned[2]).sum() == 1
    names, rows = thin_rows(tuple(map(str, range(100))), np.arange(100.0)[:, None])
    assert len(names) == len(rows) == 64 and rows[-1, 0] == 99 and names[1] == "1-2"


def test_a_short_run_is_drawn_whole() -> None:
    steps, values = np.arange(5), np.arange(10.0).reshape(2, 5)
    assert np.array_equal(thin_steps(steps, values)[1], values)
    assert np.array_equal(thin_line(steps, values[0])[1], values[0])


def test_two_figures_alike_have_one_scale_of_colours_and_axes() -> None:
    first, second = (
        plot_heat_map(Series(np.arange(1, n + 1), ("layer 0",), np.arange(1.0, n + 1)[:, None]), "size") for n in (3, 6)
    )
    one, other = match_scales(first, second)
    assert one.data[0].zmin == other.data[0].zmin == 0 and one.data[0].zmax == other.data[0].zmax == 6
    assert one.layout.xaxis.range == other.layout.xaxis.range == (1, 6)
    assert first.data[0].zmax is None, "the figures that were given stay as they are"
