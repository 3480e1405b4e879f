"""Which examples each optimizer step takes, and how a step is split into micro-batches.

The order is a pure function of seed and epoch, so the step number alone gives the position in the data: resuming
replays and skips nothing. Splitting into micro-batches changes neither a step's examples nor its loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace

import numpy as np
import torch

from training_lens.data.examples import Batch, TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import DatasetError


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: its number from 1, its epoch from 0, and the positions of its examples."""

    number: int
    epoch: int
    examples: np.ndarray


@dataclass(frozen=True)
class DataMixture:
    """How often an epoch takes each entry of data.train: `weights[e]` times.

    `entries` is the entry index of each example. A fraction is a random subset of that size, drawn anew each epoch.
    """

    entries: np.ndarray
    weights: tuple[float, ...]

    def _count_draws(self) -> list[tuple[np.ndarray, int, int]]:
        """For each entry: its positions, how often all are taken, and how many are taken once more."""
        sizes = []
        for entry, weight in enumerate(self.weights):
            positions = np.flatnonzero(self.entries == entry)
            sizes.append((positions, int(weight), round((weight - int(weight)) * len(positions))))
        return sizes

    @property
    def entry_sizes(self) -> list[int]:
        """Examples per epoch of each entry."""
        return [len(positions) * whole + part for positions, whole, part in self._count_draws()]

    @property
    def epoch_examples(self) -> int:
        return sum(self.entry_sizes)

    def draw_epoch(self, generator: np.random.Generator) -> np.ndarray:
        """The positions of one epoch, in no particular order."""
        parts: list[np.ndarray] = []
        for positions, whole, part in self._count_draws():
            parts += [np.tile(positions, whole), generator.permutation(positions)[:part]]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Schedule:
    """The steps of a run over `examples` examples in global batches of `global_batch`; `mix` weights the sources."""

    examples: int
    global_batch: int
    epochs: float
    max_steps: int | None
    seed: int
    mix: DataMixture | None = None

    @property
    def epoch_examples(self) -> int:
        """Examples per epoch; with a mix, some occur twice and some not at all."""
        return self.examples if self.mix is None else self.mix.epoch_examples

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.epoch_examples / self.global_batch)

    @property
    def steps_in_epochs(self) -> int:
        """Steps of all epochs, ignoring max_steps."""
        return max(1, math.ceil(round(self.epochs * self.steps_per_epoch, 6)))

    @property
    def total_steps(self) -> int:
        """`max_steps` if set, even beyond the epochs: the rows then repeat."""
        return self.max_steps or self.steps_in_epochs

    def iterate_steps(self, after: int = 0) -> Iterator[StepPlan]:
        """The plans of all steps after step `after`."""
        epoch, order = -1, np.array([], dtype=np.int64)
        for index in range(after, self.total_steps):
            if index // self.steps_per_epoch != epoch:
                epoch = index // self.steps_per_epoch
                order = epoch_order(self.examples, self.seed, epoch, self.mix)
            start = (index % self.steps_per_epoch) * self.global_batch
            yield StepPlan(index + 1, epoch, order[start : start + self.global_batch])


def epoch_order(examples: int, seed: int, epoch: int, mix: DataMixture | None = None) -> np.ndarray:
    """A random permutation of all examples, or of those that the mix draws; depends on (seed, epoch) alone."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    return generator.permutation(examples if mix is None else mix.draw_epoch(generator))


def hold_out(digests: np.ndarray, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and positions held out (at least one of each), in file order.

    Duplicates go to the same side. Groups of duplicates are drawn in random order; a group larger than what is still
    wanted is trained on.

    Args:
        digests: (examples,) uint64; equal for duplicates.

    Raises:
        DatasetError: all examples are duplicates, so nothing can be held out.
    """
    examples = len(digests)
    order = np.random.Generator(np.random.PCG64([seed, 2**31])).permutation(examples)
    _, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DatasetError(
            f"data.val_ratio: all {examples} examples say the same, so none can be held out. Give other rows, or "
            "data.validation."
        )
    wanted = min(max(1, round(examples * ratio)), examples - 1)
    is_held = _draw_groups(group[order], sizes, wanted)[group]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def limit_examples(dataset: TokenDataset, limit: int | None, seed: int) -> TokenDataset:
    """At most `limit` examples, drawn at random, in their order; None: all."""
    if limit is None or limit >= len(dataset):
        return dataset
    chosen = np.random.Generator(np.random.PCG64([seed, 2**32])).permutation(len(dataset))[:limit]
    return dataset.select(np.sort(chosen))


def _draw_groups(drawn: np.ndarray, sizes: np.ndarray, wanted: int) -> np.ndarray:
    """Which groups are held out, (groups,) bool: those that fit, in drawing order; at least the smallest."""
    is_held = np.zeros(len(sizes), dtype=bool)
    _, first = np.unique(drawn, return_index=True)
    ranked = drawn[np.sort(first)]
    for group in ranked.tolist():
        if sizes[group] <= wanted:
            is_held[group] = True
            wanted -= sizes[group]
        if not wanted:
            break
    if not is_held.any():
        is_held[ranked[np.argmin(sizes[ranked])]] = True
    return is_held


def split_micro_batches(
    positions: np.ndarray, lengths: np.ndarray, max_tokens: int, packed: bool = False
) -> list[np.ndarray]:
    """Split positions into micro-batches of at most `max_tokens` tokens, padding included; longest examples first.

    A longer example is a micro-batch of its own. `lengths` are the tokens of every example of the dataset; `packed`
    micro-batches are sequences without padding.
    """
    order = positions[order_by_length(positions, lengths)]
    batches: list[np.ndarray] = []
    while len(order):
        if packed:
            rows = max(1, int(np.searchsorted(np.cumsum(lengths[order]), max_tokens, side="right")))
        else:
            rows = max(1, int(max_tokens // lengths[order[0]]))  # the first is the longest: the padded width
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def shard_positions(positions: np.ndarray, lengths: np.ndarray, process: int, processes: int) -> np.ndarray:
    """One process's shard of a step, longest example first; see `assign_processes`."""
    ordered = positions[order_by_length(positions, lengths)]
    mine: np.ndarray = ordered[assign_processes(lengths[ordered], processes) == process]
    return mine


def assign_processes(lengths: np.ndarray, processes: int) -> np.ndarray:
    """The process of each example, given longest first, so that all have about equally many tokens.

    Each example goes to the process that has the fewest tokens so far (longest processing time first: the most tokens
    of a process are at most 4/3 of the best division's, Graham 1969).
    """
    if processes == 1:
        return np.zeros(len(lengths), dtype=np.int64)
    loads = [(0, process) for process in range(processes)]
    owners = np.empty(len(lengths), dtype=np.int64)
    for place, length in enumerate(lengths.tolist()):
        tokens, owners[place] = loads[0]
        heapreplace(loads, (tokens + length, int(owners[place])))
    return owners


def order_by_length(positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices that sort `positions` by their examples' length, longest first; ties stay in order."""
    order: np.ndarray = np.argsort(-lengths[positions], kind="stable")
    return order


def collate(examples: Sequence[TokenizedExample], fill_id: int) -> Batch:
    """Padded batch: pad on the right with `fill_id`, which is never read (see `Batch`)."""
    lengths = tuple(len(e.input_ids) for e in examples)
    input_ids = torch.full((len(examples), max(lengths)), fill_id, dtype=torch.int64)
    loss_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : lengths[row]] = torch.from_numpy(example.input_ids.astype(np.int64))
        loss_mask[row, : lengths[row]] = torch.from_numpy(example.loss_mask.copy())
    return Batch(input_ids, loss_mask, lengths, tuple(e.id for e in examples))


def pack_examples(examples: Sequence[TokenizedExample]) -> Batch:
    """Packed batch: all examples in one row, without padding."""
    lengths = tuple(len(e.input_ids) for e in examples)
    input_ids = torch.from_numpy(np.concatenate([e.input_ids for e in examples]).astype(np.int64))
    loss_mask = torch.from_numpy(np.concatenate([e.loss_mask for e in examples]))
    return Batch(input_ids[None], loss_mask[None], lengths, tuple(e.id for e in examples), is_packed=True)


def iterate_batches(
    dataset: TokenDataset, positions: np.ndarray, max_tokens: int, fill_id: int, packed: bool = False
) -> Iterator[Batch]:
    """The micro-batches of these examples, padded or packed."""
    for part in split_micro_batches(positions, dataset.lengths, max_tokens, packed):
        examples = [dataset[int(i)] for i in part]
        batch = pack_examples(examples) if packed else collate(examples, fill_id)
        yield replace(batch, positions=tuple(part.tolist()))
