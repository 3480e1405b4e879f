"""The outputs of the decoder layers, without and with the adapter, on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training_lens.collectors.token_positions import TokenPositions
from training_lens.core.probe import Probe, evaluation_mode
from training_lens.errors import LensError
from training_lens.measures.activation_measures import drift, linear_cka, rms
from training_lens.models.adapters import base_only
from training_lens.models.model_classes import decoder_of, unwrap_adapter


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
        device = self.adapter[0].device  # with layers on several devices, the first one's
        return {k: torch.stack([v.to(device, non_blocking=True) for v in values]) for k, values in by_measure.items()}


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
        with evaluation_mode(self._model), base_only(self._model):
            base = self._run_decoder(probe, positions)
        with evaluation_mode(self._model):
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
