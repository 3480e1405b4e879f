"""Figures of the adapter's effect on activations, from a recording or from extracted states."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from training_lens.analysis.figures.layer_figures import plot_adapter_share
from training_lens.analysis.figures.run_figures import plot_divergence
from training_lens.analysis.figures.style import add_line, build_canvas, plot_heat_map
from training_lens.collectors.layer_activations import LayerStates
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series
from training_lens.errors import LensError
from training_lens.measures.activation_measures import rms


def plot_activation_drift(recording: Recording) -> go.Figure:
    """|h - h0| / |h0| on the probe set, by layer over steps."""
    return plot_heat_map(_read_layers(recording, "drift"), "|h - h0| / |h0|")


def _read_layers(recording: Recording, measure: str) -> Series:
    """A measure of the layer outputs, sorted by layer number."""
    found = recording.series(tables.ACTIVATIONS, measure)
    numbers = [name.removeprefix("layers.") for name in found.names]
    order = sorted(range(len(numbers)), key=lambda i: (not numbers[i].isdigit(), numbers[i].zfill(9)))
    return Series(found.steps, tuple(numbers[i] for i in order), found.values[:, order])


class ActivationVisualizer:
    """Figures of activations.

    Args:
        source: a recording of a run with a probe set, or the result of `ActivationExtractor.extract`.

    Example:
        ActivationVisualizer(CheckpointAnalyzer(run).recording).drift().show()
        ActivationVisualizer(ActivationExtractor(model, tokenizer).extract(texts)).sizes().show()
    """

    def __init__(self, source: Recording | LayerStates) -> None:
        self.source = source

    def drift(self) -> go.Figure:
        """The distance of each layer's output from the one without the adapter, over steps or for these states."""
        if isinstance(self.source, Recording):
            return plot_activation_drift(self.source)
        return _plot_over_layers({"drift": self.source.measures()["drift"].tolist()}, "|h - h0| / |h0|")

    def sizes(self) -> go.Figure:
        """The root mean square of each layer's output, over steps or for these states with the adapter off and on."""
        if isinstance(self.source, Recording):
            return plot_heat_map(_read_layers(self.source, "rms"), "root mean square", log=True)
        sides = {"adapter off": self.source.base, "adapter on": self.source.adapter}
        return _plot_over_layers(
            {name: [float(rms(h)) for h in side] for name, side in sides.items()}, "root mean square"
        )

    def share(self) -> go.Figure:
        """The adapter's share of the output over steps, by module type.

        Raises:
            LensError: the source is no recording.
        """
        return plot_adapter_share(self._require_recording())

    def divergence(self) -> go.Figure:
        """The forward KL from the base over steps.

        Raises:
            LensError: the source is no recording.
        """
        return plot_divergence(self._require_recording())

    def _require_recording(self) -> Recording:
        if isinstance(self.source, Recording):
            return self.source
        raise LensError(
            "this figure is over steps, but ActivationVisualizer has the states of a single pass. Give it the "
            "recording of a run (CheckpointAnalyzer(RUN).recording)."
        )


def _plot_over_layers(values: Mapping[str, list[float]], y: str) -> go.Figure:
    figure = build_canvas("layer", y)
    for name, by_layer in values.items():
        add_line(figure, np.arange(len(by_layer)), np.array(by_layer), name)
    return figure.update_yaxes(rangemode="tozero")
