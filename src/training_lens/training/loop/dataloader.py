"""The micro-batches that this process takes of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from training_lens.data.batching import StepPlan, batches_of, cut, share
from training_lens.data.examples import Batch
from training_lens.data.token_dataset import TokenDataset
from training_lens.utils.prefetch import ahead
from training_lens.utils.processes import Processes


@dataclass(frozen=True)
class _Ready:
    """A step's micro-batches, made before its turn, and the most tokens that they were cut to."""

    plan: StepPlan
    max_tokens: int
    batches: tuple[Batch, ...]


class Feed:
    """This process's share of each step, as micro-batches.

    Args:
        dataset: the training examples.
        fill_id: a token id to pad with; never read.
        in_line: micro-batches are lines of examples, which have no padding.
    """

    def __init__(self, dataset: TokenDataset, processes: Processes, fill_id: int, in_line: bool) -> None:
        self._dataset, self._processes, self._fill_id, self._in_line = dataset, processes, fill_id, in_line
        self.ahead = processes.device.type == "cuda"  # on a CPU the thread would take time from what computes
        self._ready: _Ready | None = None

    def batches(self, plan: StepPlan, max_tokens: int) -> Iterator[Batch]:
        """A step's micro-batches of at most `max_tokens` tokens, made one by one, or those made ahead.

        What was made ahead with another number of tokens is dropped: memory has run out since.
        """
        ready = self._ready
        if ready and (ready.plan.number, ready.max_tokens) == (plan.number, max_tokens):
            return iter(ready.batches)
        return self._made(self._mine(plan), max_tokens)

    def through(self, plans: Iterator[StepPlan], max_tokens: Callable[[], int]) -> Iterator[StepPlan]:
        """The plans in their order; where it works `ahead`, a thread makes the next one's micro-batches meanwhile."""
        if not self.ahead:
            yield from plans
            return

        def made(plan: StepPlan) -> _Ready:
            tokens = max_tokens()
            return _Ready(plan, tokens, tuple(self._made(self._mine(plan), tokens)))

        for ready in ahead(map(made, plans)):
            self._ready = ready
            yield ready.plan

    def divisible(self, plan: StepPlan, max_tokens: int) -> int:
        """Tokens, without padding, of the largest micro-batch of a step that has several examples; 0: none has."""
        lengths = self._dataset.lengths
        parts = cut(self._mine(plan), lengths, max_tokens, self._in_line)
        return max((int(lengths[part].sum()) for part in parts if len(part) > 1), default=0)

    def longest(self, max_tokens: int) -> Batch:
        """A micro-batch of the longest examples of all: none takes more memory for its tokens."""
        order = np.argsort(-self._dataset.lengths, kind="stable")
        return next(self._made(order[:max_tokens], max_tokens))

    def _mine(self, plan: StepPlan) -> np.ndarray:
        return share(plan.examples, self._dataset.lengths, self._processes.index, self._processes.count)

    def _made(self, positions: np.ndarray, max_tokens: int) -> Iterator[Batch]:
        return batches_of(self._dataset, positions, max_tokens, self._fill_id, self._in_line)
