"""Learning rate, optimizer and gradient norm: the arithmetic of an update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from training_lens.config.schema import TrainingSection

Scheduler = Literal["linear", "cosine", "cosine_with_restarts", "constant"]


def default_lr(width: int) -> float:
    """A peak learning rate for LoRA from the model's hidden width, to two digits: 5e-5 * 10 * (2000 / width)^0.781.

    Source: the fit over Llama models that Thinking Machines published with "LoRA Without Regret" (2025): LoRA's best
    rate is ten times that of full fine-tuning and falls with width. Below about 1,000 it is extrapolated.

    Example:
        >>> default_lr(4096), default_lr(192)
        (0.00029, 0.0031)
    """
    return float(f"{5e-5 * 10 * (2000 / width) ** 0.781:.1e}")


def lr_at(step: int, total_steps: int, peak: float, scheduler: Scheduler, warmup_ratio: float) -> float:
    """The learning rate of step `step`, counted from 1.

    It rises linearly to `peak` over ceil(warmup_ratio * total_steps) steps, the first of them not at zero, and then
    falls to zero just behind the last step, linearly or as half a cosine, or stays.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step <= warmup:
        return peak * step / (warmup + 1)
    if scheduler == "constant":
        return peak
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    return peak * (1 - progress if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizer(
    parameters: Sequence[torch.nn.Parameter], training: TrainingSection, lr: float
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with PyTorch's fused update where the device has one."""
    return torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=training.weight_decay, fused=_fusable(parameters)
    )


def _fusable(parameters: Sequence[torch.nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") for p in parameters)


def grad_norm(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, a scalar on their device; no synchronisation."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return norm


def clip_(parameters: Sequence[torch.nn.Parameter], norm: Tensor, max_norm: float | None) -> None:
    """Scale the gradients so that their norm is at most `max_norm`; `norm` is what it is now."""
    if max_norm is None:
        return
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors ('exp_avg/<parameter>'), for a safetensors file."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{key}/{names[i]}": torch.as_tensor(v) for i, entry in state.items() for key, v in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, for parameters of the same names in the same order."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, parameter = name.split("/", 1)
        state.setdefault(names.index(parameter), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
