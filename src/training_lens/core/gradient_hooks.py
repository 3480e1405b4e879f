"""Hooks on a training loop that is not ours: gradients before clipping, and the raw loss. They only read tensors.

Labels of its batches that are hardly meant are noticed: learned prompts and padding, an end token that is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
IGNORE_INDEX = -100  # the label of a token that is not supervised, in transformers
LOOKED_AT = 512  # tokens of a row, for a template's marks
LEAST_ROWS, MARK = 3, 3  # rows that a template shows in; tokens of its mark between prompt and answer


class GradientHooks:
    """Copies each parameter's gradient after every backward pass: accumulated, not yet clipped.

    Every micro-batch is copied, because the last one that reaches a parameter is not known in advance: an expert may
    get no token in it. Cost: memory for the adapter's gradients, and one copy of them for each micro-batch.

    Args:
        scale: gives the factor that gradients are multiplied by (a GradScaler's `get_scale`); None: 1.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], scale: Any = None) -> None:
        self._gradients: dict[int, Tensor] = {}
        self._scale = scale
        self._divisor: float | None = None
        hook = self._copy_gradient
        self._handles = [p.register_post_accumulate_grad_hook(hook) for p in parameters if p.requires_grad]

    def __call__(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The unscaled gradient; None where the step gave it none."""
        gradient = self._gradients.get(id(parameter))
        if gradient is None or self._scale is None:
            return gradient
        if self._divisor is None:
            self._divisor = self._scale()  # waits for the device, so once a step
        return gradient / self._divisor

    def clear(self) -> None:
        """Drop the gradients at the end of a step."""
        self._gradients.clear()
        self._divisor = None

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def _copy_gradient(self, parameter: torch.nn.Parameter) -> None:
        if parameter.grad is None:
            return
        if id(parameter) in self._gradients:
            self._gradients[id(parameter)].copy_(parameter.grad)
        else:
            self._gradients[id(parameter)] = parameter.grad.detach().clone()


class LossHook:
    """Reads the raw loss of a step from the outputs of the model's forward passes.

    The HF Trainer's log replaces a loss that is not finite and averages over steps; this hook does neither. A loss
    divided by the step's token count (`num_items_in_batch`) is summed over micro-batches, any other is averaged. TRL's
    trainers return log-probabilities: these are summed and divided by the number of labels.

    Only a loss that the backward pass goes through counts, and log-probabilities only where all labels have the same
    weight. So nothing is reported for a trainer with its own loss (DPO, label smoothing). Warns of faults in the labels
    of the first pass: see `describe_label_faults`. Cost: waits for the device there, and in the first backward pass
    through log-probabilities.
    """

    def __init__(self, model: Any) -> None:
        self._handle = model.register_forward_hook(self._read_output, with_kwargs=True)
        self._end_tokens = getattr(getattr(model, "config", None), "eos_token_id", None)
        self._is_checked = False  # whether the labels of a first batch were looked at
        self.supervised_tokens: Tensor | None = None  # of the step whose loss was taken last, where labels were seen
        self._has_equal_weights: bool | None = None
        self._reset()

    def take_loss(self) -> Tensor | None:
        """The loss since the last call; None where no backward pass went through one."""
        self.supervised_tokens = self._targets
        if self._passes == 0:
            self._reset()
            return None
        loss = self._sum / (self._tokens if self._tokens is not None else 1 if self._is_summed else self._passes)
        self._reset()
        return loss

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def _reset(self) -> None:
        self._sum, self._passes, self._is_summed = torch.zeros(()), 0, False
        self._tokens: Tensor | None = None
        self._targets: Tensor | None = None  # labels that are not masked, of the passes so far

    def _read_output(self, module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if not self._is_checked:
            self._is_checked = True
            for fault in describe_label_faults(kwargs, self._end_tokens):
                logger.warning("the labels of the first batch: %s", fault)
        if isinstance(labels := kwargs.get("labels"), Tensor):
            count = (labels[..., 1:] != IGNORE_INDEX).sum()
            self._targets = count if self._targets is None else self._targets + count
        loss, log_probs = getattr(output, "loss", None), getattr(output, "log_probs", None)
        if log_probs is not None and log_probs.requires_grad:
            scores, labels = log_probs.detach(), output.label_mask.detach()
            log_probs.register_hook(lambda gradient: self._add_log_probs(gradient, scores, labels))
        elif loss is not None and loss.requires_grad:
            value, self._is_summed = loss.detach(), kwargs.get("num_items_in_batch") is not None
            loss.register_hook(lambda _: self._add_loss(value))

    def _add_log_probs(self, gradient: Tensor, scores: Tensor, labels: Tensor) -> None:
        if self._has_equal_weights is None:
            smallest = gradient.masked_fill(~labels, torch.inf).min()
            self._has_equal_weights = not smallest < gradient.masked_fill(~labels, -torch.inf).max()
        if self._has_equal_weights:
            tokens = labels.sum()
            self._tokens = tokens if self._tokens is None else self._tokens + tokens
            self._add_loss(-scores.sum())

    def _add_loss(self, value: Tensor) -> None:
        self._sum = value if self._passes == 0 else self._sum + value
        self._passes += 1


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
