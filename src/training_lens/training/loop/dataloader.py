"""The dataloader: each step's micro-batches for this process, prefetched in a thread while a GPU computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from training_lens.data.batching import (
    StepPlan,
    assign_processes,
    iterate_batches,
    shard_positions,
    split_micro_batches,
)
from training_lens.data.examples import Batch
from training_lens.data.token_dataset import TokenDataset
from training_lens.utils.prefetch import prefetch
from training_lens.utils.processes import Processes


@dataclass(frozen=True)
class _PrefetchedStep:
    """A step with its micro-batches, and the most tokens that they were cut to."""

    plan: StepPlan
    max_tokens: int
    batches: tuple[Batch, ...]


class DataLoader:
    """This process's share of each step, as micro-batches.

    Args:
        dataset: the training examples.
        pad_id: a token id to pad with; the model never sees it.
        is_packed: micro-batches are packed sequences, without padding.
    """

    def __init__(self, dataset: TokenDataset, processes: Processes, pad_id: int, is_packed: bool) -> None:
        self._dataset, self._processes, self._pad_id, self._is_packed = dataset, processes, pad_id, is_packed
        self.prefetches = processes.device.type == "cuda"  # on a CPU the thread would take time from what computes
        self._prefetched: _PrefetchedStep | None = None

    def iterate_steps(self, plans: Iterator[StepPlan], max_tokens: Callable[[], int]) -> Iterator[StepPlan]:
        """The plans in order; with `prefetches`, a thread makes the next one's micro-batches meanwhile."""
        if not self.prefetches:
            yield from plans
            return

        def load_step(plan: StepPlan) -> _PrefetchedStep:
            tokens = max_tokens()
            return _PrefetchedStep(plan, tokens, tuple(self._make_batches(self._own_examples(plan), tokens)))

        for step in prefetch(map(load_step, plans)):
            self._prefetched = step
            yield step.plan

    def micro_batches(self, plan: StepPlan, max_tokens: int) -> Iterator[Batch]:
        """A step's micro-batches of at most `max_tokens` tokens: the prefetched ones, or made one by one.

        Those prefetched for another number of tokens are dropped: memory has run out since.
        """
        step = self._prefetched
        if step and (step.plan.number, step.max_tokens) == (plan.number, max_tokens):
            return iter(step.batches)
        return self._make_batches(self._own_examples(plan), max_tokens)

    def passes(self, plan: StepPlan, max_tokens: int) -> Iterator[tuple[Batch, bool, bool]]:
        """A step's micro-batches, each with whether its loss counts, and whether it is this process's last."""
        counted = ((batch, True) for batch in self.micro_batches(plan, max_tokens))
        batches = chain(counted, ((batch, False) for batch in self._filler_batches(plan, max_tokens)))
        held = next(batches, None)
        while held is not None:
            following = next(batches, None)
            yield *held, following is None
            held = following

    def _filler_batches(self, plan: StepPlan, max_tokens: int) -> Iterator[Batch]:
        """Batches whose losses count for nothing, where a base is sharded: all processes run equally many passes."""
        if not self._processes.is_base_sharded:
            return
        counts = [len(self._split(self._examples_of(plan, process), max_tokens)) for process in range(self._count)]
        for _ in range(max(counts) - counts[self._processes.index]):
            yield next(self._make_batches(np.array([self._dataset.lengths.argmin()]), max_tokens))

    def largest_divisible(self, plan: StepPlan, max_tokens: int) -> int:
        """Tokens, without padding, of the step's largest micro-batch of several examples; 0 where each has only one."""
        lengths = self._dataset.lengths
        parts = self._split(self._own_examples(plan), max_tokens)
        return max((int(lengths[part].sum()) for part in parts if len(part) > 1), default=0)

    def longest_batch(self, max_tokens: int) -> Batch:
        """A micro-batch of the longest examples of all: none takes more memory for its tokens."""
        order = np.argsort(-self._dataset.lengths, kind="stable")
        return next(self._make_batches(order[:max_tokens], max_tokens))

    def own_places(self, plan: StepPlan) -> np.ndarray:
        """Which of the step's examples, longest first, are this process's: (examples,) bool."""
        lengths = self._dataset.lengths[plan.examples]
        mine: np.ndarray = assign_processes(-np.sort(-lengths), self._count) == self._processes.index
        return mine

    @property
    def _count(self) -> int:
        return self._processes.count

    def _own_examples(self, plan: StepPlan) -> np.ndarray:
        return self._examples_of(plan, self._processes.index)

    def _examples_of(self, plan: StepPlan, process: int) -> np.ndarray:
        return shard_positions(plan.examples, self._dataset.lengths, process, self._count)

    def _split(self, positions: np.ndarray, max_tokens: int) -> list[np.ndarray]:
        return split_micro_batches(positions, self._dataset.lengths, max_tokens, self._is_packed)

    def _make_batches(self, positions: np.ndarray, max_tokens: int) -> Iterator[Batch]:
        return iterate_batches(self._dataset, positions, max_tokens, self._pad_id, self._is_packed)
