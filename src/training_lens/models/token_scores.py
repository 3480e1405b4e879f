"""Scores of supervised tokens: only their logits are computed, in small chunks; with gradients where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from training_lens.models.adapters import base_only
from training_lens.models.model_classes import decoder_of, unwrap_adapter
from training_lens.models.rotary import padded_positions

LOGITS_AT_ONCE = 2**23  # numbers in one chunk of logits: 32 MB in float32
GPU_CHUNKS = 8  # of a CPU's chunks in one of a GPU: the output layer is read again for each


@dataclass(frozen=True)
class TokenScores:
    """The scores of each supervised token, (targets,), row by row."""

    nll: Float[Tensor, targets]  # float32, in nats
    correct: Bool[Tensor, targets]  # whether the token is the most likely one


def supervised_scores(
    model: Any,
    input_ids: Int[Tensor, "rows width"],
    loss_mask: Bool[Tensor, "rows width"],
    lengths: Sequence[int] | Tensor = (),
) -> TokenScores:
    """The scores of each supervised token, computed in chunks of logits; for use without gradients.

    `nll` is -log softmax(h_t W^T)[x_{t+1}] in nats, for every t with loss_mask[t+1]. Memory holds `LOGITS_AT_ONCE`
    logits and a copy, however many targets there are. A long-rope model needs the lengths of padded rows.
    """
    rows, columns = loss_mask[:, 1:].nonzero(as_tuple=True)  # of the positions whose next token is supervised
    decoded = _DecoderPass(model, input_ids, lengths)
    chunks = decoded.split_chunks(decoded.states[rows, columns], input_ids[rows, columns + 1])
    return _concatenate_scores(
        [_score_tokens(decoded.logits(part), wanted) for part, wanted in chunks], input_ids.device
    )


@dataclass(frozen=True)
class PairedScores:
    """Base and adapter on the same supervised tokens."""

    base: TokenScores
    adapter: TokenScores
    kl: Float[Tensor, targets]  # KL(p_base || p_adapter) in nats at each token, exact over the vocabulary, float32


def paired_scores(
    model: Any,
    input_ids: Int[Tensor, "rows width"],
    loss_mask: Bool[Tensor, "rows width"],
    lengths: Sequence[int] | Tensor = (),
    base_states: Float[Tensor, "targets hidden"] | None = None,
) -> PairedScores:
    """The scores of a PEFT model with its adapter off and on, and `forward_kl` between the two.

    `lengths` are those of `supervised_scores`, and `base_states` those of an earlier call of `read_base_states`. Cost:
    two passes through the decoder, one with `base_states`; seven chunks of logits at once.
    """
    rows, columns = loss_mask[:, 1:].nonzero(as_tuple=True)
    if base_states is None:
        base_states = read_base_states(model, input_ids, loss_mask, lengths)
    decoded = _DecoderPass(model, input_ids, lengths)
    states = torch.stack([base_states, decoded.states[rows, columns]], 1)  # (targets, 2, hidden)
    base, adapter, divergence = [], [], [torch.zeros(0, device=input_ids.device)]
    for part, wanted in decoded.split_chunks(states, input_ids[rows, columns + 1]):
        with base_only(model):
            of_base = decoded.logits(part[:, 0])
        of_adapter = decoded.logits(part[:, 1])
        base.append(_score_tokens(of_base, wanted))
        adapter.append(_score_tokens(of_adapter, wanted))
        divergence.append(forward_kl(of_base, of_adapter))
    device = input_ids.device
    return PairedScores(_concatenate_scores(base, device), _concatenate_scores(adapter, device), torch.cat(divergence))


def read_base_states(
    model: Any,
    input_ids: Int[Tensor, "rows width"],
    loss_mask: Bool[Tensor, "rows width"],
    lengths: Sequence[int] | Tensor = (),
) -> Float[Tensor, "targets hidden"]:
    """The base's states that the supervised tokens are predicted from. Cost: one pass through the decoder."""
    rows, columns = loss_mask[:, 1:].nonzero(as_tuple=True)
    with base_only(model):
        states: Tensor = _DecoderPass(model, input_ids, lengths).states[rows, columns]
    return states


def backward_nll(
    model: Any,
    input_ids: Int[Tensor, "rows width"],
    loss_mask: Bool[Tensor, "rows width"],
    lengths: Sequence[int] | Tensor,
    flattened: Callable[[Tensor], AbstractContextManager[None]],
    weights: Float[Tensor, targets] | None = None,
) -> Float[Tensor, targets]:
    """Each supervised token's loss, after a backward pass of their sum to all leaves that ask for gradients.

    Args:
        flattened: a context in which logits of some states are computed; given the row of each.
        weights: of each token in the sum; None: 1.

    The logits' part goes backward chunk by chunk, so that memory holds one chunk of them with its gradient.
    """
    rows, columns = loss_mask[:, 1:].nonzero(as_tuple=True)
    decoded = _DecoderPass(model, input_ids, lengths)
    states = decoded.states[rows, columns]
    leaf = states.detach().requires_grad_()
    losses, size = [torch.zeros(0, device=input_ids.device)], decoded.chunk_size(states)
    shares = torch.ones(len(rows), device=input_ids.device) if weights is None else weights
    for part, wanted, of_rows, share in zip(
        leaf.split(size), input_ids[rows, columns + 1].split(size), rows.split(size), shares.split(size), strict=True
    ):
        with flattened(of_rows):
            nll = cross_entropy(decoded.logits(part), wanted, reduction="none")
        (nll * share).sum().backward()
        losses.append(nll.detach())
    if states.requires_grad and leaf.grad is not None:
        states.backward(leaf.grad)
    return torch.cat(losses)


def last_logits(model: Any, input_ids: Int[Tensor, "1 length"]) -> Float[Tensor, vocabulary]:
    """The logits of the token after a text. Cost: one forward pass."""
    with torch.inference_mode():
        decoded = _DecoderPass(model, input_ids, ())
        return decoded.logits(decoded.states[0, -1:])[0]


def forward_kl(
    base_logits: Float[Tensor, "*positions vocabulary"], adapter_logits: Float[Tensor, "*positions vocabulary"]
) -> Float[Tensor, "*positions"]:
    """How much the adapter changed the prediction at each position, in nats; exactly 0 for equal logits.

    Formula: KL(p || q) = sum_v p(v) (log p(v) - log q(v)), the forward KL from the base p to the adapter q, as in
    arXiv 2509.04259; a token with logit -inf in the base adds nothing. Cost: five float32 copies of logits.
    """
    log_p, log_q = _widen(base_logits).log_softmax(-1), _widen(adapter_logits).log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill_(p == 0, 0).sum(-1)


def _score_tokens(logits: Float[Tensor, "part vocabulary"], targets: Int[Tensor, part]) -> TokenScores:
    return TokenScores(cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets)


def _concatenate_scores(parts: list[TokenScores], device: torch.device) -> TokenScores:
    nothing = TokenScores(torch.zeros(0, device=device), torch.zeros(0, dtype=torch.bool, device=device))
    parts = [nothing, *parts]
    return TokenScores(torch.cat([p.nll for p in parts]), torch.cat([p.correct for p in parts]))


class _DecoderPass:
    """The decoder's states of a batch, (rows, width, hidden), and the model's own map from states to logits."""

    def __init__(self, model: Any, input_ids: Int[Tensor, "rows width"], lengths: Sequence[int] | Tensor) -> None:
        self._whole = unwrap_adapter(model)
        decoder = decoder_of(model)
        places = padded_positions(decoder, lengths, input_ids.shape[1], input_ids.device)
        self._output = decoder(input_ids=input_ids, use_cache=False, **places)
        self.states: Tensor = self._output[0]

    def split_chunks(self, states: Tensor, targets: Int[Tensor, targets]) -> Iterator[tuple[Tensor, Tensor]]:
        """States and targets in chunks whose logits fit into `LOGITS_AT_ONCE`."""
        size = self.chunk_size(states)
        return zip(states.split(size), targets.split(size), strict=True)

    def chunk_size(self, states: Tensor) -> int:
        """The states whose logits are computed at once."""
        most = LOGITS_AT_ONCE * (1 if states.device.type == "cpu" else GPU_CHUNKS)
        return max(1, most // int(self._whole.config.get_text_config().vocab_size))

    def logits(self, states: Float[Tensor, "part hidden"]) -> Float[Tensor, "part vocabulary"]:
        """See `logits_from_states`."""
        return logits_from_states(self._whole, states, type(self._output))


def logits_from_states(
    whole: Any, states: Float[Tensor, "part hidden"], output: Callable[..., Any]
) -> Float[Tensor, "part vocabulary"]:
    """Logits in float32 from the decoder's states: the model's own forward, its decoder replaced by these states.

    So all that the model computes after its decoder is included: output layer, adapter on it, scaling, soft caps.
    `whole` is the model without PEFT's wrapper, `output` the type of the decoder's output.
    """
    decoder, calls = decoder_of(whole), []

    def return_states(*_args: Any, **_kwargs: Any) -> Any:
        calls.append(True)
        return output(last_hidden_state=states[None])

    decoder.forward = return_states
    try:
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)  # not read
        logits: Tensor = whole(input_ids=ids, use_cache=False).logits
    finally:
        del decoder.forward
    assert calls, f"{type(whole).__name__} computes its logits without calling {type(decoder).__name__}"
    return _widen(logits[0])


def _widen(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
