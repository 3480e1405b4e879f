"""The logit lens of base and adapter: what each layer's output would predict, and where the two models part.

A layer's states go through the final norm and the output layer, as if no layer came after it (nostalgebraist 2020,
"interpreting GPT: the logit lens"). The lens is not calibrated in early layers, so only the difference between base and
adapter is read, each through its own norm and output layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training_lens.collectors.layer_activations import TokenPositions, decoder_layers, record_states
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only
from training_lens.models.model_classes import decoder_of, evaluation_mode, unwrap_adapter
from training_lens.models.token_scores import forward_kl, logits_from_states
from training_lens.utils.devices import autocast

POSITIONS_AT_ONCE = 32  # whose logits are in memory together
PARTED = 0.5  # of the last layer's KL: the first layer from which on it stays above is where the models part


@dataclass(frozen=True)
class PredictionPair:
    """What base and adapter predict for some tokens, on the CPU: (tokens,), or (layers, tokens) of a lens.

    `kl` is KL(base || adapter) in nats; the log-probabilities (float64) are those of the token that stands there,
    `base_top` and `adapter_top` (int64) the likeliest ones.
    """

    kl: Tensor
    base_logp: Tensor
    adapter_logp: Tensor
    base_top: Tensor
    adapter_top: Tensor

    @classmethod
    def from_rows(cls, rows: Tensor) -> PredictionPair:
        """From (..., 5, tokens), as `_compare_states` has them."""
        kl, base_logp, adapter_logp, *tops = rows.double().cpu().unbind(-2)
        return cls(kl, base_logp, adapter_logp, *(top.long() for top in tops))


@dataclass(frozen=True)
class AnswerLens:
    """The predictions of base and adapter for an answer's tokens, and those of each layer's lens.

    `layers` is None where the model has no lens, for the `reason`.
    """

    final: PredictionPair
    layers: PredictionPair | None
    reason: str = ""


def find_parting(kl: Tensor) -> int | None:
    """The first layer from which on the mean KL stays above half of the last layer's; None where there is none.

    Args:
        kl: (layers, tokens).

    A threshold of ours: from there on the larger part of the difference is there.
    """
    mean = kl.mean(1)
    if not mean[-1] > 0:
        return None
    below = (mean < PARTED * mean[-1]).nonzero()
    return int(below[-1]) + 1 if len(below) else 0


def read_answer_lens(session: Session, ids: Tensor, places: Tensor) -> AnswerLens:
    """The predictions of base and adapter for the tokens at `places` of one text, and each layer's.

    Args:
        ids: (length,) int64; `places` (tokens,) int64, from 1: a token is predicted from the one before it.

    Cost: two passes of the model, and two of the output layer for each layer and once more.
    """
    model, device = session.model, session.device
    batch, wanted = ids[None].to(device), ids[places].to(device)
    positions = TokenPositions(places.to(device) - 1, (1, len(ids)))
    with torch.inference_mode(), evaluation_mode(model), autocast(device, session.precision):
        with base_only(model):
            base = _read_states(model, batch, positions)
        adapter = _read_states(model, batch, positions)
        final = _compare_states(model, (base.end, adapter.end), base.output, wanted)
        if base.normalize is None or adapter.normalize is None:
            reason = (
                f"the logit lens found no norm after the layers of this {type(unwrap_adapter(model)).__name__}, so its "
                "layers cannot be compared by what they would predict"
            )
            return AnswerLens(PredictionPair.from_rows(final), None, reason)
        layers = []
        for before, after in zip(base.layers, adapter.layers, strict=True):
            with base_only(model):
                normed = base.normalize(before[None])[0]
            pair = normed, adapter.normalize(after[None])[0]
            layers.append(_compare_states(model, pair, base.output, wanted))
    return AnswerLens(PredictionPair.from_rows(final), PredictionPair.from_rows(torch.stack(layers)))


@dataclass(frozen=True)
class _DecoderStates:
    """The states at some positions, (n, hidden): of each layer, and the decoder's own output.

    `normalize` turns the last layer's into that; None if no module of the decoder does.
    """

    layers: list[Tensor]
    end: Tensor
    normalize: Callable[[Tensor], Tensor] | None
    output: type


def _read_states(model: Any, batch: Tensor, positions: TokenPositions) -> _DecoderStates:
    decoder, layers, calls = decoder_of(model), decoder_layers(model), list[tuple[Any, Tensor, Tensor]]()

    def note_call(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, inputs[0], output))

    within = {id(module) for layer in layers for module in layer.modules()} | {id(decoder)}
    handles = [m.register_forward_hook(note_call) for m in decoder.modules() if id(m) not in within]
    try:
        with record_states(layers, positions) as states:
            output = decoder(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    end = positions.select_states(output[0])
    normalize: Callable[[Tensor], Tensor] | None = (lambda x: x) if torch.equal(end, states[-1]) else None
    for module, given, result in calls:
        if given.shape == result.shape == output[0].shape and torch.equal(result, output[0]):
            normalize = module if torch.equal(positions.select_states(given), states[-1]) else normalize
    return _DecoderStates(list(states), end, normalize, type(output))


def _compare_states(model: Any, pair: tuple[Tensor, Tensor], output: type, wanted: Tensor) -> Tensor:
    """(5, tokens) from states before the head: KL, both log-probabilities of the wanted tokens, both likeliest ones."""
    whole, parts = unwrap_adapter(model), []
    chunks = (x.split(POSITIONS_AT_ONCE) for x in (*pair, wanted))
    for before, after, targets in zip(*chunks, strict=True):
        with base_only(model):
            of_base = logits_from_states(whole, before, output)
        of_adapter = logits_from_states(whole, after, output)
        logp = [x.log_softmax(-1).gather(1, targets[:, None])[:, 0] for x in (of_base, of_adapter)]
        tops = [x.argmax(-1).to(logp[0].dtype) for x in (of_base, of_adapter)]
        parts.append(torch.stack([forward_kl(of_base, of_adapter), *logp, *tops]))
    return torch.cat(parts, 1)
