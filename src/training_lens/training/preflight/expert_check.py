"""Whether every expert of a mixture that tokens were routed to trains: part of the check of the first updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.experts import (
    Routing,
    adapted_path,
    count_routed,
    expert_name,
    is_expert_adapter,
    split_a,
    split_b,
    watch_routing,
)
from training_lens.utils.devices import move_to_one_device

NO_GRADIENT = "tokens of the loss were routed to these experts, and no gradient reaches them"
NO_UPDATE = "the updates of these experts are 0, though gradients and learning rate are not"
WEAK_TOKEN = 1e-6  # of the largest gradient of a token's output: a weaker one may vanish in an expert by rounding
WEAK_GRADIENT = 1e-7  # norm of an expert's gradient up to which Adam's eps of 1e-8 may leave no update in float32


@dataclass(frozen=True)
class ExpertFactors:
    """The factors of all experts of one parameter."""

    path: str
    owner: str  # the module of experts
    a: nn.Parameter
    b: nn.Parameter
    experts: int
    computing: int  # the first so many; others are identities (LongCat), whose factors are never used

    def names(self) -> list[str]:
        """Of each expert that computes, as in the lens."""
        return [expert_name(self.path, expert) for expert in range(self.computing)]

    def norms(self, a: Tensor, b: Tensor) -> Tensor:
        """Norms of two tensors like A and B, of each expert's slice, (experts, 2), float64 where the device has it."""
        wide = torch.float32 if a.device.type == "mps" else torch.float64
        parts = split_a(a.detach().to(wide), self.experts), split_b(b.detach().to(wide), self.experts)
        return torch.stack([part.flatten(1).norm(dim=1) for part in parts], 1)


@dataclass(frozen=True)
class ExpertOutcome:
    """What became of the adapted experts: the cause for each that does not train, and those without tokens so far."""

    causes: dict[str, str]
    not_routed: list[str]
    total: int


class ExpertCheck:
    """Follows the experts of a model through its first updates.

    A token counts for an expert if the loss depends on what the expert gave for it: prompt tokens in the last layer do
    not. Cost: a hook on each module of experts and its output's gradient, no sync point.
    """

    def __init__(self, model: Any) -> None:
        self._factors = tuple(find_factors(model))
        self._routed: dict[str, Tensor] = {}  # module of experts -> tokens of each expert, so far
        self._largest: list[Tensor] = []  # of each parameter's gradient norms so far, (experts, 2)
        self._before = [each.norms(each.a, each.b) for each in self._factors]
        self._hooks = ExitStack()
        if self._factors:
            self._hooks.enter_context(watch_routing(model, self._watch))

    def add_gradients(self) -> None:
        """A step's gradients are there."""
        found = [
            each.norms(*(torch.zeros_like(p) if p.grad is None else p.grad for p in (each.a, each.b)))
            for each in self._factors
        ]
        earlier = self._largest or found
        self._largest = [torch.maximum(one, other) for one, other in zip(earlier, found, strict=True)]

    def finish(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def judge(self) -> ExpertOutcome:
        """What became of each expert. A sync point."""
        causes: dict[str, str] = {}
        not_routed: list[str] = []
        for each, before, largest in zip(self._factors, self._before, self._largest, strict=True):
            moved = (each.norms(each.a, each.b) != before).any(1)
            gradient = largest.amax(1)
            routed = self._routed.get(each.owner, torch.zeros_like(gradient)) > 0
            outcomes = [part[: each.computing].double() for part in (routed, gradient, moved)]
            table = torch.stack(move_to_one_device(outcomes), 1).tolist()
            for name, (is_routed, norm, is_moved) in zip(each.names(), table, strict=True):
                if is_routed and not norm:
                    causes[name] = NO_GRADIENT
                elif norm > WEAK_GRADIENT and not is_moved:
                    causes[name] = NO_UPDATE
                elif not norm:
                    not_routed.append(name)
        return ExpertOutcome(causes, not_routed, sum(each.computing for each in self._factors))

    def _watch(self, path: str, routing: Routing, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return

        def count(gradient: Tensor) -> None:
            sizes = gradient.detach().flatten(0, -2).abs().amax(-1)  # (tokens,)
            counted = (sizes > WEAK_TOKEN * sizes.max())[:, None].expand_as(routing.chosen)
            if routing.weights is not None:
                counted = counted & (routing.weights.abs() > WEAK_TOKEN)
            routed = count_routed(routing, counted)
            self._routed[path] = self._routed[path] + routed if path in self._routed else routed

        if any(each.owner == path for each in self._factors):
            output.register_hook(count)


def find_factors(model: Any) -> Iterator[ExpertFactors]:
    """The factors of the experts that a PEFT model adapts in one parameter each."""
    for path, layer in model.get_base_model().named_modules() if hasattr(model, "get_base_model") else ():
        if is_expert_adapter(layer):
            (name,) = layer.lora_A
            parameter = adapted_path(path, layer)
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            computing = min(len(p) for p in layer.get_base_layer().parameters(recurse=False) if p.ndim == 3)
            yield ExpertFactors(parameter, parameter.rpartition(".")[0], a, b, layer.num_experts, computing)
