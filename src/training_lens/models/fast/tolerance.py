"""The one rule for when two results are equal up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = {  # root mean square of the difference over that of the expected result, for one layer
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
}
WHOLE_MODEL = 4.0  # times a single layer's rounding


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`, in float32 or wider."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = (found.to(wide) - expected.to(wide)).square().mean().sqrt()
    return float(difference / expected.to(wide).square().mean().sqrt().clamp_min(1e-30))


def is_close(found: Tensor, expected: Tensor, slack: float = 1.0, dtype: torch.dtype | None = None) -> bool:
    """Whether both have one shape and dtype and differ by no more than `slack` times the rounding of `dtype`.

    Args:
        dtype: that they were computed in; None: their own.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return relative_error(found, expected) <= slack * ROUNDING.get(dtype or expected.dtype, 0.0)
