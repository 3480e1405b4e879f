"""A model's losses on the supervised tokens of a tokenized set: sums for each example, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from training_lens.data.batching import collate, shard_positions, split_micro_batches
from training_lens.data.examples import Batch
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import EvaluationError
from training_lens.models.model_classes import evaluation_mode
from training_lens.models.token_scores import TokenScores, paired_scores, read_base_states, supervised_scores
from training_lens.utils.devices import Precision, autocast, free_memory, keep_freed_memory
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
MOST_STATE_BYTES = 2**30


@dataclass(frozen=True)
class TokenSums:
    """One model's sums over the supervised tokens of each example, arrays of (examples,).

    `nll` is float64, in nats; `tokens` counts the supervised tokens, `correct` those that the model ranks first.
    """

    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True)
class PairedSums:
    """Base and adapter on the same examples; `kl` sums KL(p_base || p_adapter) over each one's supervised tokens."""

    base: TokenSums
    adapter: TokenSums
    kl: np.ndarray  # (examples,) float64, nats


@dataclass(frozen=True)
class EvaluationOptions:
    """How a dataset is evaluated: each process takes its share, and all get the whole result.

    `max_tokens` is the most tokens (padding included) in one forward pass; it is halved where memory runs out.
    `fill_id` is the token id to pad with; `advance` is called with the number of examples done.
    """

    processes: Processes
    precision: Precision
    max_tokens: int
    fill_id: int
    advance: Callable[[float], None] = lambda _examples: None


def token_sums(model: Any, dataset: TokenDataset, options: EvaluationOptions) -> TokenSums:
    """The sums of every example. The model is in eval mode meanwhile.

    Raises:
        EvaluationError: evaluation failed in this process or another.
    """

    def columns(batch: Batch) -> torch.Tensor:
        return _stack_columns(supervised_scores(model, batch.input_ids, batch.loss_mask, batch.lengths))

    table = _sum_examples(model, dataset, options, columns, width=2)
    return _build_sums(table, dataset)


def find_greedy_matches(model: Any, dataset: TokenDataset, options: EvaluationOptions) -> list[np.ndarray]:
    """For each example, whether the model ranks each supervised token first, given the true tokens before it: bool.

    The model is in eval mode meanwhile. Cost: one forward pass of every example, on this process alone.

    Raises:
        EvaluationError: evaluation failed.
    """
    found: list[np.ndarray] = [np.zeros(0, dtype=bool)] * len(dataset)
    counts = dataset.supervised_counts

    def columns(batch: Batch) -> torch.Tensor:
        return supervised_scores(model, batch.input_ids, batch.loss_mask, batch.lengths).correct[:, None]

    try:
        with evaluation_mode(model):
            for part, values in _score_batches(dataset, options, columns):
                rows = np.split(values[:, 0].cpu().numpy(), np.cumsum(counts[part])[:-1])  # a sync point a batch
                for place, row in zip(part.tolist(), rows, strict=True):
                    found[place] = row
                options.advance(len(part))
    except (RuntimeError, MemoryError) as error:
        raise EvaluationError(f"evaluating failed: {describe_error(error)}") from error
    return found


@dataclass
class BaseStates:
    """The base's states of a dataset's batches, kept so that several adapters are compared with one pass of the base.

    At most `MOST_STATE_BYTES` are kept; the base computes the other batches each time.
    """

    _by_batch: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)
    _bytes: int = 0

    def read(self, model: Any, batch: Batch) -> torch.Tensor:
        """Those of a batch, computed where they are not kept; see `read_base_states`."""
        known = self._by_batch.get(batch.example_ids)
        if known is not None:
            return known
        states = read_base_states(model, batch.input_ids, batch.loss_mask, batch.lengths)
        if self._bytes + states.nbytes <= MOST_STATE_BYTES:
            self._by_batch[batch.example_ids], self._bytes = states, self._bytes + states.nbytes
        return states


def paired_sums(
    model: Any, dataset: TokenDataset, options: EvaluationOptions, base: BaseStates | None = None
) -> PairedSums:
    """The sums of a PEFT model with its adapter off and on, and the KL divergence between the two.

    `base` keeps the base's states for the next call on the same dataset.

    Raises:
        EvaluationError: evaluation failed in this process or another.
    """

    def columns(batch: Batch) -> torch.Tensor:
        states = base.read(model, batch) if base else None
        pair = paired_scores(model, batch.input_ids, batch.loss_mask, batch.lengths, states)
        return torch.cat([_stack_columns(pair.base), _stack_columns(pair.adapter), pair.kl[:, None]], 1)

    table = _sum_examples(model, dataset, options, columns, width=5)
    return PairedSums(_build_sums(table[:, :2], dataset), _build_sums(table[:, 2:4], dataset), table[:, 4])


def _stack_columns(scores: TokenScores) -> torch.Tensor:
    """(targets, 2): the loss, and whether the model ranks the token first."""
    return torch.stack([scores.nll, scores.correct.float()], 1)


def _build_sums(table: np.ndarray, dataset: TokenDataset) -> TokenSums:
    return TokenSums(table[:, 0], dataset.supervised_counts, table[:, 1].round().astype(np.int64))


@keep_freed_memory()
def _sum_examples(
    model: Any, dataset: TokenDataset, options: EvaluationOptions, columns: Callable[[Batch], torch.Tensor], width: int
) -> np.ndarray:
    """(examples, width) float64: the values of `columns` for each supervised token, summed for each example.

    A process that fails still takes part in the all-reduce, so that no other process waits for ever.
    """
    table = torch.zeros(len(dataset) + 1, width, dtype=torch.float64)  # the last row counts failures
    failure: Exception | None = None
    with evaluation_mode(model):
        try:
            for part, values in _score_batches(dataset, options, columns):
                examples = torch.from_numpy(np.repeat(part, dataset.supervised_counts[part]))
                table.index_add_(0, examples, values.cpu().double())  # a sync point a batch
                options.advance(len(part))
        except Exception as error:
            if options.processes.is_base_sharded:
                raise  # the others wait in a pass, not for a sum
            failure, table[-1] = error, 1.0
    whole = options.processes.reduce_sum(table)
    if whole[-1].any():
        raise EvaluationError(
            f"evaluating failed: {describe_error(failure) if failure else 'in another process.'}"
        ) from failure
    return whole[:-1].numpy()


def _shard(dataset: TokenDataset, options: EvaluationOptions) -> list[list[np.ndarray]]:
    """The batches of each process."""
    everything, lengths = np.arange(len(dataset)), dataset.lengths
    count = options.processes.count
    parts = [shard_positions(everything, lengths, process, count) for process in range(count)]
    return [split_micro_batches(part, lengths, options.max_tokens) for part in parts]


def _score_together(
    dataset: TokenDataset,
    options: EvaluationOptions,
    columns: Callable[[Batch], torch.Tensor],
    shards: list[list[np.ndarray]],
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """This process's batches where a sharded base makes each pass one of all: who is done repeats its shortest row."""
    processes, device = options.processes, options.processes.device
    own, filler = shards[processes.index], np.array([dataset.lengths.argmin()])
    for place in range(max(map(len, shards))):
        part = own[place] if place < len(own) else filler
        batch = collate([dataset[int(i)] for i in part], options.fill_id).move_to(device)
        with torch.no_grad(), autocast(device, options.precision):  # FSDP2 gathers no weights in inference mode
            values = columns(batch)
        if place < len(own):
            yield part, values


def _score_batches(
    dataset: TokenDataset, options: EvaluationOptions, columns: Callable[[Batch], torch.Tensor]
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """This process's examples in batches, each with its `columns`; batches are halved where memory runs out."""
    processes, device = options.processes, options.processes.device
    shards = _shard(dataset, options)
    waiting = shards[processes.index]
    if processes.is_base_sharded:
        yield from _score_together(dataset, options, columns, shards)
        return
    while waiting:
        batch = collate([dataset[int(i)] for i in waiting[0]], options.fill_id).move_to(device)
        tokens, values = batch.input_ids.numel(), None
        try:
            with torch.inference_mode(), autocast(device, options.precision):
                values = columns(batch)
        except (RuntimeError, MemoryError) as error:
            if len(waiting[0]) == 1 or not is_out_of_memory(error):
                raise
        if values is not None:
            yield waiting.pop(0), values
            continue
        logger.warning("out of memory in a batch of %d tokens: continuing with %d", tokens, tokens // 2)
        waiting = split_micro_batches(np.concatenate(waiting), dataset.lengths, tokens // 2)
        del batch
        free_memory()


@dataclass(frozen=True)
class LossReport:
    """Mean loss in nats per supervised token, over all rows and for each domain and file.

    `by_file` is empty where there is only one file; `row_nll` is the summed loss of each row. `error` is the standard
    error of `loss` over rows, None for a single row; `sample_loss` the loss of the run's validation sample among them.
    """

    loss: float
    supervised_tokens: int
    by_domain: dict[str, float] = field(default_factory=dict)
    by_file: dict[str, float] = field(default_factory=dict)
    row_nll: np.ndarray | None = field(default=None, repr=False, compare=False)
    error: float | None = None
    sample_loss: float | None = None


def evaluate_loss(model: Any, dataset: TokenDataset, options: EvaluationOptions) -> LossReport:
    """The loss on every example of `dataset`: sum of the supervised tokens' losses over their number.

    Sums are float64, so the batching changes only the float32 rounding of single losses.

    Raises:
        EvaluationError: evaluation failed in this process or another.
    """
    sums = token_sums(model, dataset, options)
    by_file = _mean_losses(sums, dataset.files)
    return LossReport(
        float(sums.nll.sum() / sums.tokens.sum()),
        int(sums.tokens.sum()),
        _mean_losses(sums, dataset.domains),
        by_file if len(by_file) > 1 else {},
        sums.nll,
        estimate_error(sums.nll, sums.tokens),
    )


def estimate_error(sums: np.ndarray, tokens: np.ndarray) -> float | None:
    """The standard error of a mean per token, sums over tokens, whose rows are the independent draws; None for one row.

    Formula: that of `measures.activation_measures.ratio_error`.
    """
    rows, away = len(sums), sums - tokens * (sums.sum() / tokens.sum())
    return float(np.sqrt(rows / (rows - 1) * (away**2).sum()) / tokens.sum()) if rows > 1 else None


def _mean_losses(sums: TokenSums, names: np.ndarray) -> dict[str, float]:
    """The loss of the examples of each name; those without a name are left out."""
    known = sorted({str(name) for name in names if name is not None})
    return {n: float(sums.nll[names == n].sum() / sums.tokens[names == n].sum()) for n in known}
