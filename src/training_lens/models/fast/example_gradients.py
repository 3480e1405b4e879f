"""The gradient of each example of a packed row, from the one backward pass that otherwise gives their sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor, nn

_ACTIVE: ContextVar[ExampleGradients | None] = ContextVar("example gradients", default=None)


class ExampleGradients:
    """The gradient of each packed example by the factors of LoRA, whose sum over examples is a layer's gradient.

    Within `collect`, the backward pass of fused linear layers writes it into `found`, (examples, numbers), and gives
    the factors no gradient of their own; numbers are those of `parameters`, one after the other.

    Args:
        lengths: of the packed examples, in order; what the row has behind them belongs to none.

    Example:
        gradients = ExampleGradients(batch.lengths, parameters)
        with gradients.collect():
            rest = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = gradients.found if gradients.is_complete(rest) else None
    """

    def __init__(self, lengths: Sequence[int], parameters: Sequence[nn.Parameter]) -> None:
        self.spans = list(pairwise(accumulate(lengths, initial=0)))
        sizes = [parameter.numel() for parameter in parameters]
        self.found = torch.zeros(len(lengths), sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        places = pairwise(accumulate(sizes, initial=0))
        self._places = {id(parameter): place for parameter, place in zip(parameters, places, strict=True)}
        self._written = set[int]()
        self._has_other_tokens = False

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Within the block forward passes note that their backward passes, also later ones, leave gradients here."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def is_complete(self, others: Iterable[Tensor | None]) -> bool:
        """Whether every parameter's gradient is here, given those that the backward pass gave itself."""
        return (
            not self._has_other_tokens
            and self._written == set(self._places)
            and all(gradient is None for gradient in others)
        )

    def accept_input(self, tokens: int) -> bool:
        """Whether a layer's input of so many tokens can be the packed row; if not, the gradients are incomplete."""
        self._has_other_tokens |= tokens < self.spans[-1][1]
        return not self._has_other_tokens

    def add(self, example: int, factors: Sequence[int], gradients: Iterable[Tensor]) -> None:
        """Add an example's gradients by factors, which are named by the `id` of their parameters."""
        for factor, gradient in zip(factors, gradients, strict=True):
            if place := self._places.get(factor):
                assert place[1] - place[0] == prod(gradient.shape)
                self.found[example, slice(*place)] += gradient.flatten()
                self._written.add(factor)


def active_collection() -> ExampleGradients | None:
    """What the passes within `ExampleGradients.collect` write to; None outside."""
    return _ACTIVE.get()
