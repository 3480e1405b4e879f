"""What the probe set shows of the whole model: its layers' outputs, and how far its predictions are from the base's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from training_lens.collectors.layer_activations import LayerStates, decoder_layers, kept_states
from training_lens.collectors.token_positions import Positions
from training_lens.core import table_names as tables
from training_lens.core.collector import DataCollector, Watched
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Cadence, Captured, DataType, Moment
from training_lens.measures.activation_measures import projection

SKETCHED = 64  # positions of a sketch
SKETCH_DIMS = 16  # numbers of each
SKETCH_SEED = 0


@CollectorRegistry.register
class ActivationsCollector(DataCollector):
    """Each decoder layer's output on the probe set, with the adapter and against the base (table `activations`).

    Rows are layers.0, layers.1, ... Measured at up to 256 real tokens of the probe set (the smaller of this and the
    manifest's `probe` tokens), which is also the sample size of CKA. Tensors: `{layer}.sketch` (64, 16), a fixed random
    projection of the adapter's states at up to 64 of these, the same at each step, and `positions` (64,), which count
    the probe's positions row by row, padding too.

    Cost: beside the probe's two forward passes, the states of both at 256 tokens in memory; a CKA for each layer.
    """

    name, data_type = tables.ACTIVATIONS, DataType.ACTIVATIONS
    moment, cadence = Moment.PROBE, Cadence.PROBE

    def start(self, watched: Watched) -> None:
        """Find the layers.

        Raises:
            LensError: the model's decoder keeps no list of them.
        """
        self._layers = decoder_layers(watched.model)

    @contextmanager
    def watching(self, watched: Watched) -> Iterator[None]:
        """Keep what the layers give in the base's pass and then in the adapter's, or in the one for both."""
        assert watched.probe is not None
        positions = Positions.of_mask(watched.probe.real)
        with kept_states(self._layers, positions) as states:
            yield
        half = len(states) // 2
        base, adapter = (states, states) if watched.one_pass else (states[:half], states[half:])
        self._states = LayerStates(tuple(base), tuple(adapter), positions)

    def collect(self, watched: Watched, step: int) -> Captured:
        """Of the states that the probe's passes left."""
        states = self._states
        del self._states  # the memory of two passes
        return Captured(states.measures(), tensors=_sketches(states), rows=states.names)


def _sketches(states: LayerStates) -> dict[str, Tensor]:
    count = len(states.positions.index)
    chosen = [i * count // SKETCHED for i in range(SKETCHED)] if count > SKETCHED else list(range(count))
    sketches = {f"{name}.sketch": _sketch(h[chosen]) for name, h in zip(states.names, states.adapter, strict=True)}
    return {"positions": states.positions.index[chosen], **sketches}


def _sketch(states: Tensor) -> Tensor:
    """(positions, width) -> (positions, 16), float32; lengths are kept on average."""
    return states.float() @ projection(states.shape[1], SKETCH_DIMS, SKETCH_SEED).to(states.device)


@CollectorRegistry.register
class DivergenceCollector(DataCollector):
    """KL from the base to the adapter, and the losses of both, on the probe set (table `divergence`).

    NaN where the probe set has no supervised token. Cost: none beside the probe's passes.
    """

    name, data_type = tables.DIVERGENCE, DataType.LOSS
    moment, cadence = Moment.PROBE, Cadence.PROBE

    def collect(self, watched: Watched, step: int) -> Captured:
        """Means over the supervised tokens, of the scores that the probe's passes left."""
        scores = watched.scores
        assert scores is not None
        means = {"kl": scores.kl, "loss": scores.adapter.nll, "base_loss": scores.base.nll}
        counted = torch.full((1,), float(len(scores.kl)), device=scores.kl.device)
        return Captured({name: values.mean()[None] for name, values in means.items()} | {"tokens": counted})
