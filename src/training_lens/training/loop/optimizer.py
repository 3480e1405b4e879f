"""Optimizer, gradient norm and clipping: the arithmetic of an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from training_lens.config.schema import TrainingSection
from training_lens.models.quantization import require_bitsandbytes

Named = Sequence[tuple[str, torch.nn.Parameter]]


def build_optimizer(named: Named, training: TrainingSection, lora_plus_ratio: float | None = None) -> Optimizer:
    """The optimizer of `training.optimizer` over named parameters.

    adamw: AdamW (arXiv 1711.05101), with PyTorch's fused update where the device has one. adamw_8bit: the same with
    block-wise 8-bit moments (arXiv 2110.02861). adafactor (arXiv 1804.04235): row and column means of the second
    moment, no first moment, and the learning rate as given.

    Each group's `lr_factor` scales the step's learning rate: `lora_plus_ratio` for LoRA's B, 1 for all else.

    Raises:
        ConfigurationError: adamw_8bit without bitsandbytes.
    """
    groups: list[dict[str, Any]] = [{"params": list(named), "lr_factor": 1.0}]
    if lora_plus_ratio is not None:  # LoRA+ (arXiv 2402.12354)
        b = [(name, p) for name, p in named if ".lora_B." in name]
        rest = [(name, p) for name, p in named if ".lora_B." not in name]
        groups = [{"params": rest, "lr_factor": 1.0}, {"params": b, "lr_factor": lora_plus_ratio}]
    decay = training.weight_decay
    adam: dict[str, Any] = {"lr": training.lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay}
    optimizer: Optimizer
    if training.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        optimizer = Adafactor(groups, lr=training.lr, scale_parameter=False, relative_step=False, weight_decay=decay)
    elif training.optimizer == "adamw_8bit":
        optimizer = require_bitsandbytes("training.optimizer").optim.AdamW8bit(groups, **adam)
    else:
        fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
        optimizer = torch.optim.AdamW(groups, **adam, fused=fused)
    return optimizer


def grad_norm(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together: a scalar on their device, without synchronization."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What clipping multiplies gradients of this norm by: min(1, max_norm / (norm + 1e-6))."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def clip_gradients(parameters: Sequence[torch.nn.Parameter], norm: Tensor, max_norm: float | None) -> None:
    """Scale the gradients, whose norm is `norm`, in place so that it is at most `max_norm`; None: never."""
    if max_norm is not None:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], clip_factor(norm, max_norm))


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors ('exp_avg/<parameter>'), each its own memory, for a safetensors file."""
    return {
        f"{key}/{name}": torch.as_tensor(value).cpu().clone(memory_format=torch.contiguous_format)
        for name, parameter in _named_parameters(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, by the parameters' names."""
    index = {name: i for i, (name, _) in enumerate(_named_parameters(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        key, parameter = name.split("/", 1)
        # Step counts that were Python integers (adafactor, adamw_8bit) were saved as integer scalars.
        count = tensor.ndim == 0 and not tensor.is_floating_point()
        state.setdefault(index[parameter], {})[key] = int(tensor) if count else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _named_parameters(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Name and parameter in the order in which the optimizer numbers them: group by group."""
    return [
        pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
    ]
