"""The decoder layers' outputs on the probe set, and how far predictions are from the base's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from training_lens.collectors.layer_activations import LayerStates, decoder_layers, record_states
from training_lens.collectors.token_positions import TokenPositions
from training_lens.core import table_names as tables
from training_lens.core.collector import CaptureContext, DataCollector
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Cadence, Captured, DataType, Moment
from training_lens.measures.activation_measures import random_projection

SKETCH_POSITIONS = 64
SKETCH_DIMS = 16  # at each position
SKETCH_SEED = 0


@CollectorRegistry.register
class ActivationsCollector(DataCollector):
    """Each decoder layer's output on the probe set, with the adapter and against the base (table `activations`).

    Rows are layers.0, layers.1, ... Measured at up to 256 real tokens of the probe set (the smaller of this and the
    manifest's `probe` tokens), which is also the sample size of CKA. Tensors: `{layer}.sketch` (64, 16), a fixed random
    projection of the adapter's states at up to 64 of these tokens, the same at each step; and `positions` (64,), which
    count the probe's positions row by row, padding included.

    Cost: besides the probe's two forward passes, memory for the states of both at 256 tokens; a CKA for each layer.
    """

    name, data_type = tables.ACTIVATIONS, DataType.ACTIVATIONS
    moment, cadence = Moment.PROBE, Cadence.PROBE

    def start(self, context: CaptureContext) -> None:
        """Find the layers.

        Raises:
            LensError: the model's decoder has no list of layers.
        """
        self._layers = decoder_layers(context.model)

    @contextmanager
    def probe_hooks(self, context: CaptureContext) -> Iterator[None]:
        """Record the layers' outputs in the base's pass and then in the adapter's, or in the one for both."""
        assert context.probe is not None
        positions = TokenPositions.from_mask(context.probe.attention_mask)
        with record_states(self._layers, positions) as states:
            yield
        half = len(states) // 2
        base, adapter = (states, states) if context.one_pass else (states[:half], states[half:])
        self._states = LayerStates(tuple(base), tuple(adapter), positions)

    def collect(self, context: CaptureContext, step: int) -> Captured:
        """Measure the states of the probe's passes."""
        states = self._states
        del self._states  # frees the memory of two passes
        return Captured(states.measures(), tensors=_sketch_layers(states), rows=states.names)


def _sketch_layers(states: LayerStates) -> dict[str, Tensor]:
    count = len(states.positions.index)
    kept = min(count, SKETCH_POSITIONS)
    chosen = [i * count // kept for i in range(kept)]
    sketches = {
        f"{name}.sketch": _project_states(h[chosen]) for name, h in zip(states.names, states.adapter, strict=True)
    }
    return {"positions": states.positions.index[chosen], **sketches}


def _project_states(states: Tensor) -> Tensor:
    """(positions, width) -> (positions, 16), float32; keeps lengths on average."""
    return states.float() @ random_projection(states.shape[1], SKETCH_DIMS, SKETCH_SEED).to(states.device)


@CollectorRegistry.register
class DivergenceCollector(DataCollector):
    """KL from the base to the adapter, and the losses of both, on the probe set (table `divergence`).

    NaN where the probe set has no supervised token. Cost: none besides the probe's passes.
    """

    name, data_type = tables.DIVERGENCE, DataType.LOSS
    moment, cadence = Moment.PROBE, Cadence.PROBE

    def collect(self, context: CaptureContext, step: int) -> Captured:
        """Average the scores of the probe's passes over the supervised tokens."""
        scores = context.scores
        assert scores is not None
        means = {"kl": scores.kl, "loss": scores.adapter.nll, "base_loss": scores.base.nll}
        tokens = torch.full((1,), float(len(scores.kl)), device=scores.kl.device)
        return Captured({name: values.mean()[None] for name, values in means.items()} | {"tokens": tokens})
