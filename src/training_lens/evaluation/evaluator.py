"""The loss of a model on a tokenized set, whole and by domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from training_lens.data.batching import collate, cut, share
from training_lens.data.store import TokenDataset
from training_lens.models.kernels import supervised_nll
from training_lens.utils.devices import Precision, autocast
from training_lens.utils.processes import Processes


@dataclass(frozen=True)
class LossReport:
    """Mean loss in nats per supervised token; the tokens that it is a mean of; the same for each domain."""

    loss: float
    supervised_tokens: int
    by_domain: dict[str, float] = field(default_factory=dict)


def evaluate_loss(
    model: Any,
    dataset: TokenDataset,
    processes: Processes,
    precision: Precision,
    max_tokens: int,
    fill_id: int,
    advance: Callable[[float], None] = lambda _examples: None,
) -> LossReport:
    """The loss on every example of `dataset`: sum of the supervised tokens' losses over their number.

    Sums are taken in float64, so the cut into batches shows only in float32 rounding of single losses. The model is
    put into eval mode and back. Each process takes its share; all get the whole result.

    Args:
        max_tokens: most tokens (padding included) in one forward pass.
        advance: called with the number of examples done.
    """
    positions = share(np.arange(len(dataset)), dataset.lengths, processes.index, processes.count)
    names = sorted({d for d in dataset.domains if d is not None})
    row_of = {name: 1 + i for i, name in enumerate(names)}
    sums = torch.zeros(1 + len(names), 2, dtype=torch.float64)  # (all and each domain) x (loss, tokens)
    was_training = model.training
    model.eval()
    try:
        for part in cut(positions, dataset.lengths, max_tokens):
            batch = collate([dataset[int(i)] for i in part], fill_id).to(processes.device)
            with torch.inference_mode(), autocast(processes.device, precision):
                nll = supervised_nll(model, batch.input_ids, batch.loss_mask).cpu().double()  # a sync point a batch
            counts = dataset.supervised[part].tolist()
            for losses, domain in zip(nll.split(counts), dataset.domains[part], strict=True):
                row = torch.tensor([losses.sum().item(), len(losses)], dtype=torch.float64)
                sums[0] += row
                if domain is not None:
                    sums[row_of[domain]] += row
            advance(len(part))
    finally:
        model.train(was_training)
    (loss, tokens), *rest = processes.sum(sums).tolist()
    return LossReport(loss / tokens, int(tokens), {n: loss / t for n, (loss, t) in zip(names, rest, strict=True)})
