"""A model's own modules computed by our kernels: known by their structure, and used only where they give the same.

A module keeps its class, its parameters and its hooks; only what its call computes goes another way. What is not known,
or gives something else than the module itself on random input, stays as it is, and the report says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training_lens.models.attention import Segments, segment_attention
from training_lens.models.joined import Joined
from training_lens.models.kernels import gated_silu, rms_norm, rotate
from training_lens.models.layouts import PARTS, Heads, attentions_of, heads_of

TOKENS = 6  # of the random input on which a module and its kernel are compared
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the largest number


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
    for kind, kernel in (("gated layers", _Gated), ("adapted layers", _Adapted), ("norms", _Norm)):
        for module in list(model.modules()):
            if kernel.fits(module) and not isinstance(module.__dict__.get("forward"), _Kernel):
                refusal = _put_in(module, kernel)
                if refusal:
                    fusion.plain[refusal] += 1
                else:
                    fusion.fused[kind] += 1
    return fusion


def unfuse(model: Any) -> None:
    """Every module computes by itself again."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Kernel):
            del module.__dict__["forward"]


def _put_in(module: Any, kernel: Any) -> str:
    """Let a kernel compute a module's calls; or else, why not."""
    if "forward" in module.__dict__:
        return f"{type(module).__name__} has a forward of its own"
    refusal: str = kernel.refusal(module)
    if refusal:
        return refusal
    made = kernel(module)
    if not made.agrees():
        return f"{type(module).__name__} computes something else"
    module.forward = made
    return ""


def _fuse_attention(model: Any, fusion: Fusion) -> None:
    """All attentions, or none: a line of examples goes through every one of them."""
    attentions = attentions_of(model)
    refusal = (
        next(filter(None, map(_Attention.refusal, attentions)), "") if attentions else "no attention that is known"
    )
    heads = refusal or heads_of(model, attentions)
    if isinstance(heads, str):
        fusion.plain[heads] += max(1, len(attentions))
        return
    for module, of in heads.items():
        module.forward = _Attention(module, of)
    if packs_right(model):
        fusion.fused["attention"] = len(heads)
    else:
        unfuse(model)
        fusion.plain["attention that computes something else"] += len(heads)


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
    except (TypeError, ValueError, RuntimeError):  # an architecture that takes no such arguments
        return False
    finally:
        decoder.train(was_training)
    return _close(together, alone)


def decoder_of(model: Any) -> Any:
    """The model without its output layer."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return whole.get_decoder()


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


class _Kernel:
    """What a module's call computes in its place; `plain` is its own forward."""

    def __init__(self, module: Any) -> None:
        self.module, self.plain = module, module.forward

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether the module is of the kind."""
        raise NotImplementedError

    @staticmethod
    def refusal(module: Any) -> str:
        """Why one of the kind cannot be computed by it; empty where it can be tried."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Of the input."""
        raise NotImplementedError

    @torch.no_grad()
    def agrees(self) -> bool:
        """Whether it gives what the module itself gives, on random input."""
        like = next(self.module.parameters())
        generator = torch.Generator().manual_seed(0)  # of its own: the run's draws stay what they are
        x = torch.randn(TOKENS, self.width, generator=generator).to(like.device, _float(self.module))
        was_training = self.module.training
        self.module.eval()  # dropout draws
        try:
            return _close(self(x), self.plain(x))
        finally:
            self.module.train(was_training)


def _float(module: Any) -> torch.dtype:
    """The dtype of the frozen weights, which is that of the states."""
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    return frozen[0].dtype if frozen else torch.float32


def _close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    most = CLOSE[wanted.dtype] * max(1e-6, wanted.abs().max().item())
    return bool((found - wanted).abs().max() <= most)


class _Norm(_Kernel):
    """RMSNorm with a plain frozen weight."""

    @staticmethod
    def fits(module: Any) -> bool:
        return type(module).__name__.endswith("RMSNorm")

    @staticmethod
    def refusal(module: Any) -> str:
        known = isinstance(getattr(module, "weight", None), Tensor) and _epsilon(module) is not None
        return "" if known and not module.weight.requires_grad else f"{type(module).__name__} without a frozen weight"

    @property
    def width(self) -> int:
        return int(self.module.weight.shape[0])

    def __call__(self, x: Tensor) -> Tensor:
        weight, epsilon = self.module.weight, _epsilon(self.module)
        if weight.dtype != x.dtype or epsilon is None:
            return self.plain(x)  # type: ignore[no-any-return]
        return rms_norm(x, weight, epsilon)


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


class _Adapted(_Kernel):
    """A linear layer with LoRA."""

    @staticmethod
    def fits(module: Any) -> bool:
        return hasattr(module, "get_base_layer") and hasattr(module, "lora_A")

    @staticmethod
    def refusal(module: Any) -> str:
        return Joined.refusal([module])

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._product = Joined([module])

    @property
    def width(self) -> int:
        return int(self.module.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x) if self._product.is_ready else self.plain(x)


class _Gated(_Kernel):
    """A gated feed-forward layer, down(silu(gate(x)) * up(x))."""

    @staticmethod
    def fits(module: Any) -> bool:
        return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))

    @staticmethod
    def refusal(module: Any) -> str:
        return Joined.refusal([module.gate_proj, module.up_proj]) or Joined.refusal([module.down_proj])

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._gate_up, self._down = Joined([module.gate_proj, module.up_proj]), Joined([module.down_proj])

    @property
    def width(self) -> int:
        return int(self.module.gate_proj.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        if not (may_join(self._gate_up) and may_join(self._down)):
            return self.plain(x)  # type: ignore[no-any-return]
        return self._down(gated_silu(self._gate_up(x)))


def may_join(product: Joined) -> bool:
    """Whether nobody looks at the single layers."""
    watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in product.layers)
    return not watched and product.is_ready


class _Attention(_Kernel):
    """Attention of examples in a line; all other calls are the module's own."""

    @staticmethod
    def refusal(module: Any) -> str:
        if not all(hasattr(module, part) for part in PARTS):
            return "attention of another structure"
        return Joined.refusal([module.q_proj, module.k_proj, module.v_proj]) or Joined.refusal([module.o_proj])

    def __init__(self, module: Any, heads: Heads) -> None:
        super().__init__(module)
        self._heads = heads
        self._qkv, self._out = Joined([module.q_proj, module.k_proj, module.v_proj]), Joined([module.o_proj])

    def __call__(self, *args: Any, segments: Segments | None = None, **kwargs: Any) -> Any:
        if segments is None:
            return self.plain(*args, **kwargs)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"]
        query, key, value = self._turned(x[0], cos[0], sin[0])
        out = segment_attention(query, key, value, segments, self._heads.scale, self._heads.window)
        return _project(self._out, out.flatten(1))[None], None

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of (tokens, hidden), each (tokens, heads, width)."""
        heads = self._heads
        parts = [heads.count, heads.groups, heads.groups]
        together = _project(self._qkv, x).view(len(x), -1, heads.width)
        if heads.normed:
            query, key, value = together.split(parts, 1)
            query, key = self.module.q_norm(query), self.module.k_norm(key)
            return rotate(query, cos, sin), rotate(key, cos, sin), value
        turning, value = together.split([parts[0] + parts[1], parts[2]], 1)
        query, key = rotate(turning, cos, sin).split(parts[:2], 1)
        return query, key, value


def _project(product: Joined, x: Tensor) -> Tensor:
    return product(x) if may_join(product) else torch.cat([layer(x) for layer in product.layers], -1)
