"""Two results are equal if they differ by no more than their dtype's rounding, and have one shape and dtype."""

from __future__ import annotations

import pytest
import torch

from training_lens.models.fast.tolerance import ROUNDING, WHOLE_MODEL, is_close, relative_error


def test_the_relative_error_is_a_ratio_of_root_mean_squares() -> None:
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) > 1e20


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)],
)
def test_each_dtype_has_its_own_rounding(dtype: torch.dtype, rounding: float) -> None:
    expected = torch.full((64,), 1.0, dtype=dtype)

    def change(share: float) -> torch.Tensor:
        """Of some numbers, so that the error is this share up to a hundredth, whatever numbers the dtype has."""
        least = float(torch.finfo(dtype).eps)
        step = max(least, round(share * 8 / least) * least)
        changed = expected.repeat(10_000 // 64)
        count = round(len(changed) * (share / step) ** 2)
        changed[:count] += step
        return changed

    many = expected.repeat(10_000 // 64)
    assert ROUNDING[dtype] == rounding
    assert is_close(change(0.95 * rounding), many) and not is_close(change(1.05 * rounding), many)
    assert is_close(change(3.8 * rounding), many, WHOLE_MODEL) and not is_close(
        change(4.2 * rounding), many, WHOLE_MODEL
    )


def test_other_shapes_and_dtypes_are_not_equal() -> None:
    assert not is_close(torch.ones(1, 3), torch.ones(3))
    assert not is_close(torch.ones(3), torch.ones(3, dtype=torch.float64))
    assert not is_close(torch.tensor([torch.nan, 1.0]), torch.ones(2))
    assert not is_close(torch.tensor([2]), torch.tensor([1])) and is_close(torch.tensor([1]), torch.tensor([1]))
