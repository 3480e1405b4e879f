"""Scores of training rows for queries, by gradients at a state of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training_lens.data.batching import collate, pack_examples
from training_lens.data.examples import Batch, TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.measures.row_influence import cosine_with
from training_lens.models.adapters import trainable_parameters
from training_lens.models.fast.engine import Engine
from training_lens.models.fast.example_gradients import ExampleGradients
from training_lens.models.fast.tolerance import WHOLE_MODEL, is_close
from training_lens.models.model_classes import evaluation_mode
from training_lens.utils.devices import DTYPES, Precision, autocast
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
MOST_NUMBERS = 2**23  # of the gradients that a pack of texts leaves: 32 MiB in float32
Advance = Callable[[float], None]
Direction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PassOptions:
    """Of gradient passes: their number type, and the most tokens of a packed one."""

    precision: Precision = "fp32"
    tokens: int = 1024


def score_by_gradients(
    engine: Engine,
    rows: TokenDataset,
    queries: TokenDataset,
    options: PassOptions,
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

    Cost: a forward and a backward pass over queries and rows; memory holds the queries' gradients, and those of a pack.
    """
    scores = np.zeros((len(queries), len(rows)))
    with evaluation_mode(engine.model):
        vectors = torch.stack(list(_iterate_gradients(engine, queries, options, advance)))  # (queries, numbers)
        for row, gradient in enumerate(_iterate_gradients(engine, rows, options, advance)):
            if rows.supervised_counts[row]:
                scores[:, row] = cosine_with(vectors, direction(gradient)).cpu().numpy()  # a sync point a row
    return scores


def _iterate_gradients(engine: Engine, texts: TokenDataset, options: PassOptions, advance: Advance) -> Iterator[Tensor]:
    """The gradient of each text's mean loss, (numbers,), in order; of packed texts, where these give the same."""
    position, can_pack, is_shown = 0, engine.can_pack, False
    most = MOST_NUMBERS // sum(parameter.numel() for _, parameter in trainable_parameters(engine.model))
    while position < len(texts):
        count = _count_packed(texts.lengths[position:], options.tokens, most) if can_pack else 1
        pack = [texts[position + i] for i in range(count)]
        found = read_packed_gradients(engine, pack, options.precision) if count > 1 else None
        if found is not None and not is_shown:
            is_shown = _is_own_gradient(engine, pack, found, options.precision)
            found = found if is_shown else None
        if count > 1 and found is None:
            logger.info("gradients are computed one text at a time: of packed texts they differ, or are not known")
            can_pack = False
            continue
        yield from [read_gradient(engine, pack[0], options.precision)] if found is None else found
        position += count
        advance(count)


def _is_own_gradient(engine: Engine, pack: Sequence[TokenizedExample], found: Tensor, precision: Precision) -> bool:
    """Whether the last text with targets has, in a pack, the gradient that it has alone."""
    last = max((i for i, text in enumerate(pack) if text.loss_mask[1:].any()), default=0)
    return is_close(found[last], read_gradient(engine, pack[last], precision), WHOLE_MODEL, DTYPES[precision])


def _count_packed(lengths: np.ndarray, tokens: int, most: int) -> int:
    """How many of the next texts go into one pack; at least one."""
    return max(1, min(most, int(np.searchsorted(np.cumsum(lengths), tokens, side="right"))))


def read_packed_gradients(engine: Engine, texts: Sequence[TokenizedExample], precision: Precision) -> Tensor | None:
    """The gradient of each text's mean loss, (texts, numbers), by one packed pass; None where it gives only their sum.

    It gives them where everything that was trained are plain LoRA factors of fused layers.
    """
    parameters = [parameter for _, parameter in trainable_parameters(engine.model)]
    gradients = ExampleGradients([len(text.input_ids) for text in texts], parameters)
    targets = torch.tensor([int(text.loss_mask[1:].sum()) for text in texts]).to(gradients.found)
    if not targets.any():
        return gradients.found
    with gradients.collect():
        rest = _differentiate_loss(engine, pack_examples(texts), parameters, precision)
    if not gradients.is_complete(rest):
        return None
    return gradients.found.div_(targets.clamp_min(1)[:, None])


def read_gradient(engine: Engine, text: TokenizedExample, precision: Precision) -> Tensor:
    """The gradient of the mean loss of a text's supervised tokens, (numbers,) float32; 0 where there are none."""
    parameters = [parameter for _, parameter in trainable_parameters(engine.model)]
    if not (targets := int(text.loss_mask[1:].sum())):
        return torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
    batch = pack_examples([text]) if engine.can_pack else collate([text], fill_id=0)
    found = _differentiate_loss(engine, batch, parameters, precision)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]) / targets


def _differentiate_loss(
    engine: Engine, batch: Batch, parameters: Sequence[Tensor], precision: Precision
) -> tuple[Tensor | None, ...]:
    """The gradient of a batch's summed loss by each parameter."""
    with autocast(parameters[0].device, precision):
        packed, padded = (batch.lengths, ()) if batch.is_packed else ((), batch.lengths)
        loss = engine.loss_sum(batch.input_ids, batch.loss_mask, packed, padded)
    return torch.autograd.grad(loss, list(parameters), allow_unused=True)
