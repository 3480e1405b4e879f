"""The outputs of the decoder layers, without and with the adapter, on the same few real tokens; and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training_lens.core import table_names as tables
from training_lens.core.collector import CaptureContext, CollectorRegistry, DataCollector
from training_lens.core.probe import Probe
from training_lens.core.types import Cadence, Captured, DataType, Moment
from training_lens.errors import LensError
from training_lens.measures.activation_measures import drift, linear_cka, random_projection, ratio_error, rms
from training_lens.models.adapters import base_only
from training_lens.models.model_classes import decoder_of, evaluation_mode, unwrap_adapter
from training_lens.utils.devices import move_to_one_device

MAX_POSITIONS = 256  # of one batch
SKETCH_POSITIONS = 64
SKETCH_DIMS = 16  # at each position
SKETCH_SEED = 0


@dataclass(frozen=True)
class TokenPositions:
    """At most `MAX_POSITIONS` real positions of a batch, evenly spread; the same at each call.

    `index` (n,) counts positions row by row; `shape` is the batch's (rows, width).
    """

    index: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> TokenPositions:
        """From a (rows, width) mask that is true where there is no padding. Waits for the device."""
        rows, width = attention_mask.shape
        return cls(_spread_evenly(attention_mask.flatten().nonzero()[:, 0]), (rows, width))

    def select_states(self, states: Tensor) -> Tensor:
        """(n, features), from (rows, width, features) or (rows * width, features).

        In any other layout, such as the tokens routed to one expert, padding cannot be recognized: then up to
        `MAX_POSITIONS` of all positions.
        """
        return self._select_flat(states.reshape(-1, states.shape[-1]))

    def select_ids(self, ids: Tensor) -> Tensor:
        """(n,), from token ids (rows, width); in any other layout as in `select_states`."""
        return self._select_flat(ids.reshape(-1))

    def _select_flat(self, flat: Tensor) -> Tensor:
        rows, width = self.shape
        if len(flat) == rows * width:
            return flat[self.index.to(flat.device)]
        return flat[_spread_evenly(torch.arange(len(flat), device=flat.device))]


def _spread_evenly(index: Tensor) -> Tensor:
    """At most `MAX_POSITIONS` of an index, evenly."""
    if len(index) <= MAX_POSITIONS:
        return index
    return index[torch.arange(MAX_POSITIONS, device=index.device) * len(index) // MAX_POSITIONS]


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The layers of a causal language model's decoder, in order; shared layers once.

    Raises:
        LensError: its decoder has no list of layers.
    """
    whole = unwrap_adapter(model)
    lists = [m for m in decoder_of(model).modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    expected = getattr(whole.config.get_text_config(), "num_hidden_layers", None)
    fitting = [m for m in lists if len(m) == expected] or lists
    if not fitting:
        raise LensError(
            f"the lens found no list of layers in the decoder of this {type(whole).__name__}, so their outputs cannot "
            "be captured. Leave out the collector 'activations' (lens.collectors)."
        )
    longest = max(fitting, key=len)
    return list(dict.fromkeys(longest))


@contextmanager
def record_states(layers: Sequence[torch.nn.Module], positions: TokenPositions) -> Iterator[list[Tensor]]:
    """Within the block, each call of a layer appends a copy of its output at the positions, (n, width), to the list."""
    states: list[Tensor] = []

    def append_output(_layer: Any, _args: Any, output: Any) -> None:
        states.append(positions.select_states((output[0] if isinstance(output, tuple) else output).detach()))

    handles = [layer.register_forward_hook(append_output) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class LayerStates:
    """The output of each decoder layer on the same tokens: `base` without the adapter, `adapter` with it.

    Both have one (n, width) for each layer, in the model's dtype; `positions` are the n tokens.
    """

    base: tuple[Tensor, ...]
    adapter: tuple[Tensor, ...]
    positions: TokenPositions

    @property
    def names(self) -> list[str]:
        """layers.0, layers.1, ..."""
        return [f"layers.{i}" for i in range(len(self.adapter))]

    def measures(self) -> dict[str, Tensor]:
        """mean, rms, drift and cka of each layer, (layers,); `tables.MEASURES` defines them.

        CKA has len(positions.index) samples; it is NaN below 4. Cost: float64 Gram matrices (n, n), one layer at a
        time.
        """
        pairs = list(zip(self.base, self.adapter, strict=True))
        by_measure = {
            "mean": [h.float().mean() for h in self.adapter],
            "rms": [rms(h) for h in self.adapter],
            "drift": [drift(h, h0) for h0, h in pairs],
            "cka": [linear_cka(h0, h).value for h0, h in pairs],
        }
        return {measure: torch.stack(move_to_one_device(values)) for measure, values in by_measure.items()}


class ActivationExtractor:
    """Extracts each decoder layer's output, with the adapter off and on, at up to 256 real positions of a batch.

    It leaves the model unchanged, and draws no random numbers.

    Args:
        model: a PEFT model; without an adapter, both outputs are the same.
        tokenizer: needed for texts.

    Raises:
        LensError: the model's decoder has no list of layers.

    Example:
        states = ActivationExtractor(model, tokenizer).extract(["The cat sat on the mat."])
        print(dict(zip(states.names, states.measures()["drift"].tolist())))
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._layers = decoder_layers(model)

    def extract(self, batch: Probe | Mapping[str, Any] | Sequence[Mapping[str, Any] | str]) -> LayerStates:
        """Two forward passes through the decoder.

        Args:
            batch: texts, a data collator's batch, rows with input_ids, or a probe set.

        Raises:
            LensError: texts without a tokenizer; rows without input_ids; no example of two tokens.
        """
        device = next(self._model.parameters()).device
        probe = self._build_probe(batch).move_to(device)
        positions = TokenPositions.from_mask(probe.attention_mask)
        with torch.no_grad(), evaluation_mode(self._model):
            with base_only(self._model):
                base = self._run_decoder(probe, positions)
            return LayerStates(base, self._run_decoder(probe, positions), positions)

    def _build_probe(self, batch: Probe | Mapping[str, Any] | Sequence[Mapping[str, Any] | str]) -> Probe:
        if isinstance(batch, Probe):
            return batch
        if isinstance(batch, Mapping):
            return Probe.from_batch(batch)
        if self._tokenizer is None and any(isinstance(row, str) for row in batch):
            raise LensError("texts need a tokenizer: give ActivationExtractor(model, tokenizer), or rows of input_ids.")
        rows = [{"input_ids": self._tokenizer(row)["input_ids"]} if isinstance(row, str) else row for row in batch]
        return Probe.from_batch(rows)

    def _run_decoder(self, probe: Probe, positions: TokenPositions) -> tuple[Tensor, ...]:
        with record_states(self._layers, positions) as states:
            decoder_of(self._model)(input_ids=probe.input_ids, use_cache=False)
        return tuple(states)


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
    sketches = {"positions": states.positions.index[chosen]}
    for name, h in zip(states.names, states.adapter, strict=True):
        projection = random_projection(h.shape[1], SKETCH_DIMS, SKETCH_SEED).to(h.device)
        sketches[f"{name}.sketch"] = h[chosen].float() @ projection  # (positions, 16)
    return sketches


@CollectorRegistry.register
class DivergenceCollector(DataCollector):
    """KL from the base to the adapter, and the losses of both, on the probe set (table `divergence`).

    NaN where the probe set has no supervised token. Cost: none besides the probe's passes.
    """

    name, data_type = tables.DIVERGENCE, DataType.LOSS
    moment, cadence = Moment.PROBE, Cadence.PROBE

    def start(self, context: CaptureContext) -> None:
        """Find the example of each supervised token. A sync point, once."""
        assert context.probe is not None
        self._examples = len(context.probe.lengths)
        self._rows = context.probe.loss_mask[:, 1:].nonzero(as_tuple=True)[0]

    def collect(self, context: CaptureContext, step: int) -> Captured:
        """Average the scores of the probe's passes over the supervised tokens."""
        scores = context.scores
        assert scores is not None
        means = {"kl": scores.kl, "loss": scores.adapter.nll, "base_loss": scores.base.nll}
        tokens = torch.full((1,), float(len(scores.kl)), device=scores.kl.device)
        error = ratio_error(scores.adapter.nll, self._rows, self._examples)
        averages = {name: values.mean()[None] for name, values in means.items()}
        return Captured(averages | {"tokens": tokens, "loss_error": error[None]})
