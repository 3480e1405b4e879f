"""The probe set: a few fixed examples that the model computes again and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training_lens.core.gradient_hooks import IGNORE_INDEX
from training_lens.data.batching import collate
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import LensError
from training_lens.models.token_scores import PairedScores, paired_scores, read_base_states, supervised_scores

LEAST_ROWS = 8  # of a probe set: with fewer, one odd example decides


@dataclass(frozen=True)
class Probe:
    """`input_ids` and `loss_mask` are (rows, width), padded on the right; `lengths` (rows,) counts real tokens.

    `loss_mask` is true where a token is supervised.
    """

    input_ids: Tensor
    loss_mask: Tensor
    lengths: Tensor

    @property
    def attention_mask(self) -> Tensor:
        """(rows, width), true where there is no padding."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def move_to(self, device: torch.device | str) -> Probe:
        return Probe(self.input_ids.to(device), self.loss_mask.to(device), self.lengths.to(device))

    def token_counts(self) -> dict[str, int]:
        """Examples, tokens and supervised tokens, as stored in lens.json."""
        return {
            "examples": len(self.lengths),
            "tokens": int(self.lengths.sum()),
            "supervised_tokens": int(self.loss_mask[:, 1:].sum()),
        }

    @classmethod
    def from_dataset(cls, dataset: TokenDataset, tokens: int, fill_id: int) -> Probe | None:
        """Examples with at most `tokens` tokens in all: at least 8, where the dataset has as many.

        As many as fit of those that are short enough for 8 to fit, drawn with a fixed seed. If fewer than 8 are, the
        shortest 8, each cut around the beginning of its answer where they do not fit whole. Always the same ones.
        None if `tokens` is 0, or nothing is supervised.
        """
        chosen = _choose_rows(dataset, tokens) if tokens else np.zeros(0, int)
        if not len(chosen):
            return None
        is_whole = int(dataset.lengths[chosen].sum()) <= tokens
        width = int(dataset.lengths.max()) if is_whole else max(2, tokens // len(chosen))
        examples = [_cut_example(dataset[int(i)], width) for i in chosen]
        batch = collate(examples, fill_id)
        return cls(batch.input_ids, batch.loss_mask, torch.tensor(batch.lengths))

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Probe:
        """From a data collator's batch (input_ids, attention_mask, labels), or from rows with the same keys.

        Without labels every token is supervised. Padding may be on either side.

        Raises:
            LensError: there are no input_ids, or the labels have another shape.
        """
        rows = list(_unpad_rows(batch))
        width = max((len(ids) for ids, _ in rows), default=0)
        if width < 2:
            raise LensError("the lens's probe set has no example of two tokens. Give a batch or rows with input_ids.")
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (tokens, supervised) in enumerate(rows):
            ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, supervised
        return cls(ids, mask, torch.tensor([len(tokens) for tokens, _ in rows]))


def _choose_rows(dataset: TokenDataset, tokens: int) -> np.ndarray:
    """The positions of the probe's examples, ascending."""
    lengths, usable = dataset.lengths, np.flatnonzero(dataset.supervised_counts > 0)
    short = usable[lengths[usable] <= tokens // LEAST_ROWS]
    if len(short) >= LEAST_ROWS:
        drawn, least = np.random.Generator(np.random.PCG64(0)).permutation(short), LEAST_ROWS
    else:
        drawn, least = usable[np.argsort(lengths[usable], kind="stable")], min(LEAST_ROWS, max(1, tokens // 2))
    fitting = int(np.searchsorted(np.cumsum(lengths[drawn]), tokens, side="right"))
    return np.sort(drawn[: max(least, fitting)])


def _cut_example(example: TokenizedExample, width: int) -> TokenizedExample:
    """At most `width` tokens: the first ones, or those around the first target where it comes later."""
    target = int(example.loss_mask[1:].argmax()) + 1
    start = 0 if target < width else target - width // 2
    ids, mask = (values[start : start + width] for values in (example.input_ids, example.loss_mask))
    return replace(example, input_ids=ids, loss_mask=mask)


def _unpad_rows(batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens and the supervision mask of each row, without padding."""
    keys = ("input_ids", "attention_mask", "labels")
    if isinstance(batch, Mapping):
        rows = [{k: batch[k][i] for k in keys if k in batch} for i in range(len(batch.get("input_ids", ())))]
    else:
        rows = [dict(row) for row in batch]
    for row in rows:
        if "input_ids" not in row:
            raise LensError(f"a row of the lens's probe set has no input_ids, but {', '.join(row)}.")
        tokens = torch.as_tensor(row["input_ids"]).long()
        keep = torch.as_tensor(row["attention_mask"]).bool() if "attention_mask" in row else torch.ones_like(tokens) > 0
        labels = torch.as_tensor(row["labels"]) if "labels" in row else tokens
        if labels.shape != tokens.shape or keep.shape != tokens.shape:
            raise LensError(
                f"a row of the lens's probe set has {len(tokens)} input_ids, but {len(labels)} labels and "
                f"{len(keep)} in its attention_mask. All must have one length."
            )
        yield tokens[keep].cpu(), (labels != IGNORE_INDEX)[keep].cpu()


def read_probe_states(model: Any, probe: Probe) -> Tensor:
    """The base's states that the probe's targets are predicted from: for `score_probe`, again and again."""
    return read_base_states(model, probe.input_ids, probe.loss_mask, probe.lengths)


def score_probe(model: Any, probe: Probe, one_pass: bool, base_states: Tensor | None = None) -> PairedScores:
    """The scores of the probe's supervised tokens without and with the adapter.

    Args:
        one_pass: both are known to be equal: one pass with the adapter on serves as both.
        base_states: from `read_probe_states`, which spare the base's pass.
    """
    if not one_pass:
        return paired_scores(model, probe.input_ids, probe.loss_mask, probe.lengths, base_states)
    scores = supervised_scores(model, probe.input_ids, probe.loss_mask, probe.lengths)
    return PairedScores(scores, scores, torch.zeros_like(scores.nll))
