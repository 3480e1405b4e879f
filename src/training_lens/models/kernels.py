"""The loss, computed where it is needed: logits of supervised positions only."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy


def supervised_nll(
    model: Any, input_ids: Int[Tensor, "rows width"], loss_mask: Bool[Tensor, "rows width"]
) -> Float[Tensor, targets]:
    """Negative log-likelihood in nats of each supervised token given what stands before it, in float32, row by row.

    Formula: -log softmax(h_t W^T)[x_{t+1}] for every t with loss_mask[t+1]. The hidden states of other positions are
    dropped before the output layer, so no (tokens x vocabulary) tensor of a prompt exists. What a model does to its
    logits behind that layer (scaling, soft caps) stays as it is, being element-wise.

    Cost: memory of (targets x vocabulary) logits; no device synchronisation but the one that selecting takes.
    """
    rows, columns = loss_mask[:, 1:].nonzero(as_tuple=True)  # (targets,), of the positions that predict

    def select(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][rows, columns], *inputs[1:])  # (rows, width, hidden) -> (targets, hidden)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits  # (targets, vocabulary)
    finally:
        handle.remove()
    return cross_entropy(logits.float(), input_ids[rows, columns + 1], reduction="none")
