"""Scores of training rows for queries, by gradients at a state of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from training_lens.data.batching import collate, pack_examples
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.measures.row_influence import cosine_with
from training_lens.models.adapters import trainable_parameters
from training_lens.models.fast.engine import Engine
from training_lens.models.model_classes import evaluation_mode
from training_lens.utils.devices import Precision, autocast

Advance = Callable[[float], None]
Direction = Callable[[Tensor], Tensor]


def score_by_gradients(
    engine: Engine,
    rows: TokenDataset,
    queries: TokenDataset,
    precision: Precision,
    direction: Direction,
    advance: Advance = lambda _: None,
) -> np.ndarray:
    """The cosine of each query's gradient with the direction that each row's gives, (queries, rows) float64.

    A gradient is that of the mean loss of a text's supervised tokens with respect to all trained numbers of the
    adapter, unprojected and without dropout. Above 0: a step on the row lowers the query's loss, to first order. A row
    without supervised tokens scores 0.

    Args:
        direction: from a row's gradient, (numbers,), to the direction against which the weights would move.
        advance: called after each text.

    Cost: a forward and a backward pass for each query and row, one by one; memory holds the queries' gradients.
    """
    scores = np.zeros((len(queries), len(rows)))
    vectors = torch.stack(list(_iterate_gradients(engine, queries, precision, advance)))  # (queries, numbers)
    for row, gradient in enumerate(_iterate_gradients(engine, rows, precision, advance)):
        if rows.supervised_counts[row]:
            scores[:, row] = cosine_with(vectors, direction(gradient)).cpu().numpy()  # a sync point a row
    return scores


def _iterate_gradients(engine: Engine, texts: TokenDataset, precision: Precision, advance: Advance) -> Iterator[Tensor]:
    """The gradient of each text's mean loss, (numbers,), in the order of the trained parameters."""
    with evaluation_mode(engine.model):
        for position in range(len(texts)):
            yield read_gradient(engine, texts[position], precision)
            advance(1)


def read_gradient(engine: Engine, text: TokenizedExample, precision: Precision) -> Tensor:
    """The gradient of the mean loss of a text's supervised tokens, (numbers,) float32; 0 where there are none."""
    parameters = [parameter for _, parameter in trainable_parameters(engine.model)]
    batch = pack_examples([text]) if engine.can_pack else collate([text], fill_id=0)
    targets = int(batch.loss_mask[:, 1:].sum())
    if not targets:
        return torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
    with autocast(parameters[0].device, precision):
        packed, padded = (batch.lengths, ()) if batch.is_packed else ((), batch.lengths)
        loss = engine.loss_sum(batch.input_ids, batch.loss_mask, packed, padded) / targets
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
