"""The loss of a model on a tokenized set, whole, by domain and by file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Mean loss in nats per supervised token; the tokens that it is a mean of; the same for each domain and file.

    `by_file` is empty where there is one file only.
    """

    loss: float
    supervised_tokens: int
    by_domain: dict[str, float] = field(default_factory=dict)
    by_file: dict[str, float] = field(default_factory=dict)


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
    sums = _Sums(_Groups.of(dataset.domains), _Groups.of(dataset.files))
    was_training = model.training
    model.eval()
    try:
        for part in cut(positions, dataset.lengths, max_tokens):
            batch = collate([dataset[int(i)] for i in part], fill_id).to(processes.device)
            with torch.inference_mode(), autocast(processes.device, precision):
                nll = supervised_nll(model, batch.input_ids, batch.loss_mask).cpu().double()  # a sync point a batch
            sums.add(part, nll.split(dataset.supervised[part].tolist()))
            advance(len(part))
    finally:
        model.train(was_training)
    return sums.report(processes)


class _Sums:
    """Sums of losses and of tokens, over all examples, by domain and by file."""

    def __init__(self, domains: _Groups, files: _Groups) -> None:
        self._domains, self._files = domains, files
        self._of_domains = slice(1, 1 + len(domains.names))
        self._of_files = slice(1 + len(domains.names), 1 + len(domains.names) + len(files.names))
        self._sums = torch.zeros(self._of_files.stop, 2, dtype=torch.float64)  # x (loss, tokens)

    def add(self, examples: np.ndarray, losses: Sequence[torch.Tensor]) -> None:
        """Count in the token losses of these examples."""
        for example, nll in zip(examples, losses, strict=True):
            row = torch.tensor([nll.sum().item(), len(nll)], dtype=torch.float64)
            self._sums[0] += row
            self._sums[self._of_domains][self._domains.codes[example]] += row
            self._sums[self._of_files][self._files.codes[example]] += row

    def report(self, processes: Processes) -> LossReport:
        """The means over all processes."""
        loss, tokens = (sums := processes.sum(self._sums))[0].tolist()
        means = [total / count if count else float("nan") for total, count in sums.tolist()]
        by_file = self._files.named(means[self._of_files])
        by_domain = self._domains.named(means[self._of_domains])
        return LossReport(loss / tokens, int(tokens), by_domain, by_file if len(by_file) > 1 else {})


@dataclass(frozen=True)
class _Groups:
    """The different names of a column, and which one each example has; None is a name, too, but not reported."""

    names: list[str | None]
    codes: np.ndarray

    @classmethod
    def of(cls, column: np.ndarray) -> _Groups:
        names = sorted(set(column.tolist()), key=str)
        position = {name: i for i, name in enumerate(names)}
        return cls(names, np.array([position[name] for name in column], dtype=np.int64))

    def named(self, values: list[float]) -> dict[str, float]:
        return {name: value for name, value in zip(self.names, values, strict=True) if name is not None}
