"""The loss of training, for supervised positions only, in chunks of the vocabulary's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear, pad

from training_lens.models.fast.native import training_kernels as native
from training_lens.models.fast.native.library import can_compute, sum_dtype
from training_lens.utils.devices import move_to_device

CPU_CHUNK_BYTES = 28 * 2**20  # of one chunk of logits: from 32 MB on glibc keeps none for the next
GPU_CHUNK_BYTES = 2**28  # the output layer is read again for each chunk, so that small ones leave a GPU waiting
CACHED = 2**18  # logits that go through the passes of a softmax together on a CPU: they stay in its cache
SUMMED = 2**25  # the same on a GPU, where they take 128 MB in float32
ROWS = 64  # a CPU's chunks are of a multiple of so many: a product of a new shape costs oneDNN as much to prepare
Logits = Callable[[Tensor], Tensor]


def chunk_rows(device: torch.device, vocabulary: int, itemsize: int) -> int:
    """The rows of one chunk of logits; at least 1."""
    most = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(1, most // (vocabulary * itemsize))


def linear_nll(
    states: Float[Tensor, "targets hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " targets"],
    rows: tuple[Float[Tensor, "new hidden"], Int[Tensor, " new"]] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " targets"]]:
    """Sum of -log softmax(states W^T + b)[target] in nats, float32, and its terms, for a frozen output layer.

    Only the sum has a gradient, formed on the way: (softmax - onehot) W of each chunk. Kept for the backward pass: that
    alone, as large as `states`. Memory: one chunk of logits in the states' dtype (`chunk_rows`), some rows of it in
    float32, and the terms.

    Args:
        rows: trained rows of W, and which they are; they have a gradient, too.
    """
    values, ids = rows or (None, None)
    losses: tuple[Tensor, Tensor] = _LinearNll.apply(states, values, weight, bias, targets, ids)
    return losses


class _KnownGradient(torch.autograd.Function):
    """A sum whose forward pass saves the gradients of its first arguments; its terms and other arguments have none."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, _dterms: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        scaled = [(grad.to(dtotal.dtype) * dtotal).to(grad.dtype) for grad in grads]  # in float16 65536 is infinite
        return *scaled, *(None for _ in ctx.needs_input_grad[len(grads) :])


class _LinearNll(_KnownGradient):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        rows: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        size, multiple = chunk_rows(states.device, weight.shape[0], weight.element_size()), 1
        if states.device.type == "cpu":
            size, multiple = max(1, size // ROWS) * ROWS, ROWS
        grad, total, terms = _empty_results(ctx, states)
        trained = None if rows is None or ids is None else _TrainedRows(rows, ids, weight.dtype)
        for part, wanted, into, losses in zip(*(x.split(size) for x in (states, targets, grad, terms)), strict=True):
            filled = pad(part, (0, 0, 0, -len(part) % multiple))
            logits = linear(filled, weight, bias)  # (filled, vocabulary)
            if trained:
                trained.replace_logits(filled, logits)
            total += _to_gradient(logits[: len(part)], wanted, losses)
            own = trained.take_gradient(part, logits[: len(part)]) if trained else None
            into.copy_((logits @ weight)[: len(part)])
            if own is not None:
                into += own
        ctx.save_for_backward(grad, *([trained.grad] if trained else []))
        return total, terms


class _TrainedRows:
    """Rows of an output layer that are trained: their logits, their part of the states' gradient, and their own."""

    def __init__(self, rows: Tensor, ids: Tensor, dtype: torch.dtype) -> None:
        self._rows, self._ids = rows.to(dtype), ids
        self.grad = torch.zeros_like(rows)

    def replace_logits(self, states: Tensor, logits: Tensor) -> None:
        logits.index_copy_(1, self._ids, linear(states, self._rows))

    def take_gradient(self, states: Tensor, gradient: Tensor) -> Tensor:
        """The part of the states' gradient that passes through the rows; their logits' is set to 0 in place."""
        own = gradient[:, self._ids]  # (targets, rows)
        gradient.index_fill_(1, self._ids, 0)
        self.grad += own.T @ states
        return own @ self._rows


def _empty_results(ctx: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradient, the sum and its terms, which autograd learns to have no gradient."""
    terms = states.new_empty(len(states), dtype=sum_dtype(states))
    ctx.mark_non_differentiable(terms)
    return torch.empty_like(states), terms.new_zeros(()), terms


def _to_gradient(logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target], whose terms are written to `losses` and computed in its dtype.

    The logits become the sum's gradient, softmax - onehot.
    """
    if can_compute(logits):
        found = native.write_nll_gradient(logits, targets)
        losses.copy_(found)
        return found.sum()
    total = losses.new_zeros(())
    size = max(1, (CACHED if logits.device.type == "cpu" else SUMMED) // logits.shape[1])
    for part, wanted, into in zip(logits.split(size), targets[:, None].split(size), losses.split(size), strict=True):
        wide = part.to(losses.dtype)
        wide -= wide.amax(-1, keepdim=True)
        chosen = wide.gather(1, wanted)
        sums = wide.exp_().sum(-1, keepdim=True)
        found = (sums.log() - chosen)[:, 0]
        into.copy_(found)
        total += found.sum()
        part.copy_(wide.div_(sums).scatter_add_(1, wanted, torch.full_like(sums, -1)))
    return total


def nll(
    states: Float[Tensor, "targets hidden"],
    logits: Logits,
    targets: Int[Tensor, " targets"],
    rows: Float[Tensor, "new hidden"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " targets"]]:
    """`linear_nll` for any frozen way from states to (targets, vocabulary) logits: scaled, capped, several layers.

    Args:
        rows: the only parameter on that way that is trained.
    """
    losses: tuple[Tensor, Tensor] = _Nll.apply(states, rows, logits, targets)
    return losses


class _Nll(_KnownGradient):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, rows: Tensor | None, logits: Logits, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        vocabulary = logits(states[:1].detach()).shape[-1]
        grad, total, terms = _empty_results(ctx, states)
        size = chunk_rows(states.device, vocabulary, total.element_size())
        trained = [] if rows is None else [rows]
        sums = [torch.zeros_like(row) for row in trained]
        for part, wanted, into, losses in zip(*(x.split(size) for x in (states, targets, grad, terms)), strict=True):
            with torch.enable_grad():
                alone = part.detach().requires_grad_()
                found = cross_entropy(logits(alone).to(total.dtype), wanted, reduction="none")
                loss = found.sum()
            found_grad, *of_rows = torch.autograd.grad(loss, [alone, *trained])
            into.copy_(found_grad)
            for already, more in zip(sums, of_rows, strict=True):
                already += more
            losses.copy_(found.detach())
            total += loss.detach()
        ctx.save_for_backward(grad, *sums)
        return total, terms


def sum_by_example(losses: Float[Tensor, " targets"], counts: Int[Tensor, " examples"]) -> Float[Tensor, " examples"]:
    """The sum of each example's losses; `counts` on the CPU says how many each has, in order.

    Each sum is a reduction over a row of a padded matrix, so it is the same in every run also on a GPU, where
    `index_add` adds in any order. Memory: examples x most targets of one.
    """
    width = int(counts.max()) if len(counts) else 0
    starts = counts.cumsum(0) - counts
    shifts = torch.arange(len(counts)) * width - starts
    places = torch.arange(len(losses)) + shifts.repeat_interleave(counts, output_size=len(losses))
    padded = losses.new_zeros(len(counts) * width).index_copy_(0, move_to_device(places, losses.device), losses)
    return padded.view(len(counts), width).sum(1)
