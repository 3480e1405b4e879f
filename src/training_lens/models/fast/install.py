"""A model's own modules computed by our kernels: known by their structure, and used only where they give the same.

What is not known (`fused`), or gives something else than the module itself on random input, stays as it is, and the
report says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.classes import decoder_of
from training_lens.models.fast.layer_spec import attentions_of, heads_of
from training_lens.models.fast.module_kernels import (
    PROBE_TOKENS,
    AttentionKernel,
    LinearKernel,
    MLPKernel,
    ModuleKernel,
    NormKernel,
    close,
)
from training_lens.models.fast.packed_attention import PackedSequences


@dataclass
class InstalledKernels:
    """What of a model the kernels compute: the number of modules of each kind, and why others stayed as they are."""

    installed: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def can_pack(self) -> bool:
        """Whether examples can lie one behind the other in a line, so that nothing is padded."""
        return self.installed["attention"] > 0

    def __str__(self) -> str:
        done = ", ".join(f"{count} {kind}" for kind, count in self.installed.items() if count) or "nothing"
        left = "".join(f"; {count} as they are ({why})" for why, count in self.skipped.items())
        return f"kernels compute {done}{left}"


def install_kernels(model: Any) -> InstalledKernels:
    """Let kernels compute what they can of a PEFT model, in place; `uninstall_kernels` takes it back."""
    kernels = InstalledKernels()
    _install_attention(model, kernels)
    for kind, kernel in (("gated layers", MLPKernel), ("adapted layers", LinearKernel), ("norms", NormKernel)):
        for module in list(model.modules()):
            if kernel.fits(module) and not isinstance(module.__dict__.get("forward"), ModuleKernel):
                refusal = _install_kernel(module, kernel)
                if refusal:
                    kernels.skipped[refusal] += 1
                else:
                    kernels.installed[kind] += 1
    return kernels


def uninstall_kernels(model: Any) -> None:
    """Every module computes by itself again."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), ModuleKernel):
            del module.__dict__["forward"]


def installed_kernels(model: Any) -> list[ModuleKernel]:
    """What computes modules of the model in their place."""
    return [made for module in model.modules() if isinstance(made := module.__dict__.get("forward"), ModuleKernel)]


def _install_kernel(module: Any, kernel: Any) -> str:
    """Let a kernel compute a module's calls; or else, why not."""
    if "forward" in module.__dict__:
        return f"{type(module).__name__} has a forward of its own"
    refusal: str = kernel.refusal(module)
    if refusal:
        return refusal
    try:
        made = kernel(module)
        agrees = made.matches_module()
    except (TypeError, ValueError, RuntimeError, LookupError):  # a module of that name which takes other arguments
        return f"{type(module).__name__} takes something else"
    if not agrees:
        return f"{type(module).__name__} computes something else"
    module.forward = made
    return ""


def _install_attention(model: Any, kernels: InstalledKernels) -> None:
    """All attentions, or none: a line of examples goes through every one of them."""
    attentions = attentions_of(decoder_of(model))
    refusal = (
        next(filter(None, map(AttentionKernel.refusal, attentions)), "") if attentions else "no attention that is known"
    )
    refusal = unpackable_layers(model) or refusal
    heads = refusal or heads_of(model, attentions)
    if isinstance(heads, str):
        kernels.skipped[heads] += max(1, len(attentions))
        return
    for module, of in heads.items():
        module.forward = AttentionKernel(module, of)
    if is_packing_exact(model):
        kernels.installed["attention"] = len(heads)
    else:
        uninstall_kernels(model)
        kernels.skipped["attention that computes something else"] += len(heads)


def unpackable_layers(model: Any) -> str:
    """Which layers of a model see other tokens than those before theirs, or those in a window; else ''.

    State-space layers carry their state into the next example of a line, and chunks are counted from its beginning.
    """
    decoder = decoder_of(model)
    kinds = set(getattr(decoder.config.get_text_config(), "layer_types", None) or ())
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"layers of {unknown[0]}"
    if any(isinstance(m, nn.Conv1d) for m in decoder.modules()):
        return "layers that carry a state from token to token"
    return ""


@torch.no_grad()
def is_packing_exact(model: Any) -> bool:
    """Whether two examples in a line give the states that each gives alone."""
    decoder = decoder_of(model)
    device = next(decoder.parameters()).device
    ids = [torch.arange(2, 2 + length, device=device)[None] for length in (PROBE_TOKENS, PROBE_TOKENS - 2)]
    packed = PackedSequences(tuple(part.shape[1] for part in ids))
    was_training = decoder.training
    decoder.eval()
    try:
        alone = torch.cat([decoder(input_ids=part, use_cache=False)[0] for part in ids], 1)
        together = forward_packed(decoder, torch.cat(ids, 1), packed)[0]
    except (TypeError, ValueError, RuntimeError, LookupError):  # an architecture that takes no such arguments
        return False
    finally:
        decoder.train(was_training)
    return close(together, alone)


def forward_packed(decoder: Any, input_ids: Tensor, packed: PackedSequences) -> Any:
    """What the decoder gives of examples in a line; its first part is the last layer's states, (1, tokens, hidden)."""
    no_mask = input_ids.new_zeros(1, 1, 0, 0)  # of four dimensions: taken as it is, and read by no fused attention
    return decoder(
        input_ids=input_ids,
        position_ids=packed.position_ids(input_ids.device),
        attention_mask=no_mask,
        use_cache=False,
        packed=packed,
    )
