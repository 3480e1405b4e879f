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
from training_lens.models.fast.attention import Segments
from training_lens.models.fast.fused import TOKENS, Adapted, Attention, Gated, Kernel, Norm, close
from training_lens.models.fast.layouts import attentions_of, heads_of


@dataclass
class Fusion:
    """What of a model the kernels compute: the number of modules of each kind, and why others stayed as they are."""

    fused: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)

    @property
    def packs(self) -> bool:
        """Whether examples can lie one behind the other in a line, so that nothing is padded."""
        return self.fused["attention"] > 0

    def __str__(self) -> str:
        done = ", ".join(f"{count} {kind}" for kind, count in self.fused.items() if count) or "nothing"
        left = "".join(f"; {count} as they are ({why})" for why, count in self.plain.items())
        return f"kernels compute {done}{left}"


def fuse(model: Any) -> Fusion:
    """Let kernels compute what they can of a PEFT model, in place; `unfuse` takes it back."""
    fusion = Fusion()
    _fuse_attention(model, fusion)
    for kind, kernel in (("gated layers", Gated), ("adapted layers", Adapted), ("norms", Norm)):
        for module in list(model.modules()):
            if kernel.fits(module) and not isinstance(module.__dict__.get("forward"), Kernel):
                refusal = _put_in(module, kernel)
                if refusal:
                    fusion.plain[refusal] += 1
                else:
                    fusion.fused[kind] += 1
    return fusion


def unfuse(model: Any) -> None:
    """Every module computes by itself again."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Kernel):
            del module.__dict__["forward"]


def kernels_in(model: Any) -> list[Kernel]:
    """What computes modules of the model in their place."""
    return [made for module in model.modules() if isinstance(made := module.__dict__.get("forward"), Kernel)]


def _put_in(module: Any, kernel: Any) -> str:
    """Let a kernel compute a module's calls; or else, why not."""
    if "forward" in module.__dict__:
        return f"{type(module).__name__} has a forward of its own"
    refusal: str = kernel.refusal(module)
    if refusal:
        return refusal
    try:
        made = kernel(module)
        agrees = made.agrees()
    except (TypeError, ValueError, RuntimeError, LookupError):  # a module of that name which takes other arguments
        return f"{type(module).__name__} takes something else"
    if not agrees:
        return f"{type(module).__name__} computes something else"
    module.forward = made
    return ""


def _fuse_attention(model: Any, fusion: Fusion) -> None:
    """All attentions, or none: a line of examples goes through every one of them."""
    attentions = attentions_of(decoder_of(model))
    refusal = next(filter(None, map(Attention.refusal, attentions)), "") if attentions else "no attention that is known"
    refusal = unpackable_layers(model) or refusal
    heads = refusal or heads_of(model, attentions)
    if isinstance(heads, str):
        fusion.plain[heads] += max(1, len(attentions))
        return
    for module, of in heads.items():
        module.forward = Attention(module, of)
    if packs_right(model):
        fusion.fused["attention"] = len(heads)
    else:
        unfuse(model)
        fusion.plain["attention that computes something else"] += len(heads)


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
def packs_right(model: Any) -> bool:
    """Whether two examples in a line give the states that each gives alone."""
    decoder = decoder_of(model)
    device = next(decoder.parameters()).device
    ids = [torch.arange(2, 2 + length, device=device)[None] for length in (TOKENS, TOKENS - 2)]
    segments = Segments(tuple(part.shape[1] for part in ids))
    was_training = decoder.training
    decoder.eval()
    try:
        alone = torch.cat([decoder(input_ids=part, use_cache=False)[0] for part in ids], 1)
        together = in_line(decoder, torch.cat(ids, 1), segments)[0]
    except (TypeError, ValueError, RuntimeError, LookupError):  # an architecture that takes no such arguments
        return False
    finally:
        decoder.train(was_training)
    return close(together, alone)


def in_line(decoder: Any, input_ids: Tensor, segments: Segments) -> Any:
    """What the decoder gives of examples in a line; its first part is the last layer's states, (1, tokens, hidden)."""
    no_mask = input_ids.new_zeros(1, 1, 0, 0)  # of four dimensions: taken as it is, and read by no fused attention
    return decoder(
        input_ids=input_ids,
        position_ids=segments.positions(input_ids.device),
        attention_mask=no_mask,
        use_cache=False,
        segments=segments,
    )
