"""Labels of another trainer's batch that are hardly meant: learned prompts and padding, an end token that is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label of a token that is not supervised, in transformers
LOOKED_AT = 512  # tokens of a row, for a template's marks
LEAST_ROWS, MARK = 3, 3  # rows that a template shows in; tokens of its mark between prompt and answer


def describe_label_faults(batch: Mapping[str, Any], end_tokens: Any) -> list[str]:
    """A sentence for each fault; empty if there is none, or the batch has no labels. Cost: waits for the device once.

    Args:
        batch: what the model is called with: `input_ids`, `labels` and `attention_mask`, each (rows, width).
        end_tokens: the model's end token or tokens; None: unknown.

    Example:
        >>> ids, mask = torch.tensor([[5, 6, 2, 2]]), torch.tensor([[1, 1, 1, 0]])
        >>> describe_label_faults({"input_ids": ids, "labels": ids, "attention_mask": mask}, 2)
        ['1 of 4 labels are padding: set them to -100 in the data collator']
    """
    ids, labels, mask = (batch.get(key) for key in ("input_ids", "labels", "attention_mask"))
    if not (isinstance(ids, Tensor) and isinstance(labels, Tensor) and isinstance(mask, Tensor)):
        return []
    if not ids.shape == labels.shape == mask.shape or ids.ndim != 2:
        return []
    is_learned, is_real = labels != IGNORE_INDEX, mask.bool()
    padding = (is_learned & ~is_real).sum()
    ends = torch.isin(_last_real(ids, is_real), torch.tensor(_as_list(end_tokens), device=ids.device))
    unlearned = (ends & ~_last_real(is_learned, is_real) & is_learned.any(1)).sum()
    counts = [int(count) for count in torch.stack([padding, is_learned.sum(), unlearned, is_real.any(1).sum()])]
    faults = []
    if counts[0]:
        faults.append(f"{counts[0]} of {counts[1]} labels are padding: set them to -100 in the data collator")
    if counts[2] == counts[3]:
        faults.append(
            "the end token of each row is masked, so the model never learns to stop: give the tokenizer a pad token "
            "that is not its end token, or mask labels by the attention mask"
        )
    if bool((is_learned | ~is_real)[:, 1:].all()) and _share_template(
        [row[real] for row, real in zip(ids, is_real, strict=True)]
    ):
        faults.append(
            "every token is learned, and all rows begin alike and share a mark further on, as a template's do: their "
            "prompts are learned, too. Mask prompts with -100; plain texts of one pattern may stay as they are"
        )
    return faults


def _share_template(rows: Sequence[Tensor]) -> bool:
    """Whether different rows begin with the same two tokens, and share some neighbouring tokens after their beginning.

    The first token may be that of the beginning of every sequence.
    """
    texts = {tuple(row[:LOOKED_AT].tolist()) for row in rows}
    if len(texts) < LEAST_ROWS:
        return False
    first = next(iter(texts))
    alike = 0  # tokens that all begin with
    while all(alike < len(text) and text[alike] == first[alike] for text in texts):
        alike += 1
    marks = set.intersection(*({text[i : i + MARK] for i in range(alike, len(text) - MARK + 1)} for text in texts))
    return alike >= 2 and bool(marks)


def _last_real(values: Tensor, is_real: Tensor) -> Tensor:
    """(rows,): the value at each row's last token that is not padding."""
    positions = torch.arange(values.shape[1], device=values.device).expand(values.shape)
    return values.gather(1, positions.masked_fill(~is_real, 0).amax(1, keepdim=True))[:, 0]


def _as_list(tokens: Any) -> list[int]:
    if tokens is None:
        return []
    return [int(token) for token in tokens] if isinstance(tokens, list | tuple) else [int(tokens)]
