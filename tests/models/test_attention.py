"""Attention within a line of examples equals attention of each example alone."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention

from training_lens.models import attention
from training_lens.models.attention import Segments

segment_attention = jaxtyped(typechecker=beartype)(attention.segment_attention)
LENGTHS = Segments((4, 1, 6))


def drawn(heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(11, heads, 3, generator=generator, dtype=torch.float64).requires_grad_()


def alone(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Torch's own attention of one example after the other, with an explicit mask."""
    found = []
    for start, end in LENGTHS.bounds:
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & (back < (window or 1000))
        found.append(scaled_dot_product_attention(q, k, v, seen, scale=0.7, enable_gqa=True).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("long", "grain"), [(512, 1), (512, 4), (512, 32), (2, 4)])
def test_equals_each_example_alone_and_so_does_its_gradient(
    groups: int, window: int | None, long: int, grain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LONG", long)
    monkeypatch.setattr(attention, "GRAIN", grain)
    query, key, value = drawn(4, 0), drawn(groups, 1), drawn(groups, 2)
    found = segment_attention(query, key, value, LENGTHS, 0.7, window)
    torch.testing.assert_close(found, alone(query, key, value, window), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *qkv: segment_attention(*qkv, LENGTHS, 0.7, window), (query, key, value))


def test_segments_count_positions_from_each_example() -> None:
    device = torch.device("cpu")
    assert LENGTHS.positions(device).tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]]
    assert LENGTHS.starts(device).tolist() == [0, 4, 5, 11]
    assert LENGTHS.bounds == ((0, 4), (4, 5), (5, 11))


def test_a_long_example_keeps_no_weights() -> None:
    query, key, value = (torch.randn(1200, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        segment_attention(query, key, value, Segments((1200,)), 0.3).sum().backward()
    assert max(kept) <= query.numel()
