"""Attention within a line of examples equals attention of each example alone."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from pairwise import pairwise  # type: ignore[import-not-found]
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from training_lens.models.fast import packed_attention
from training_lens.models.fast.packed_attention import PackedSequences

segment_attention = jaxtyped(typechecker=beartype)(packed_attention.packed_attention)
LENGTHS = PackedSequences((4, 1, 6))
pytestmark = pytest.mark.usefixtures("both_ways")


def drawn(heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(11, heads, 3, generator=generator, dtype=torch.float64).requires_grad_()


def alone(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, segments: PackedSequences = LENGTHS
) -> Tensor:  # fmt: skip
    """Torch's own attention of one example after the other, with an explicit mask."""
    found = []
    for start, end in segments.spans:
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & (back < (window or 1000))
        found.append(scaled_dot_product_attention(q, k, v, seen, scale=0.7, enable_gqa=True).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_each_example_alone_and_so_does_its_gradient(groups: int, window: int | None) -> None:
    given = drawn(4, 0), drawn(groups, 1), drawn(groups, 2)
    found, wanted = segment_attention(*given, LENGTHS, 0.7, window), alone(*given, window)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    of_output = drawn(4, 3).detach()
    gradients = (torch.autograd.grad(output, given, of_output) for output in (found, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


EXACTNESS = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.06}


@pytest.mark.parametrize(
    ("lengths", "width", "window", "dtype"),
    pairwise([(32,), (33, 1, 100), (64, 31)], [20, 64, 80], [None, 1, 40], list(EXACTNESS)),
)
def test_blocks_and_heads_of_any_size_are_exact(
    lengths: tuple[int, ...], width: int, window: int | None, dtype: torch.dtype
) -> None:
    most = EXACTNESS[dtype]
    segments = PackedSequences(lengths)
    together = torch.randn(sum(lengths), 8, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = together.to(dtype).requires_grad_()  # queries, keys and values lie between each other
    found = segment_attention(*given.split([4, 2, 2], 1), segments, 0.7, window)
    wide = given.detach().double().requires_grad_()
    wanted = alone(*wide.split([4, 2, 2], 1), window, segments)
    dout = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found.backward(dout)
    wanted.backward(dout.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=most)
    torch.testing.assert_close(given.grad.double(), wide.grad, rtol=most, atol=2 * most)


def test_segments_count_positions_from_each_example() -> None:
    device = torch.device("cpu")
    assert LENGTHS.position_ids(device).tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]]
    assert LENGTHS.cu_seqlens(device).tolist() == [0, 4, 5, 11]
    assert LENGTHS.spans == ((0, 4), (4, 5), (5, 11))


def test_a_long_example_keeps_no_weights() -> None:
    query, key, value = (torch.randn(1200, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        segment_attention(query, key, value, PackedSequences((1200,)), 0.3).sum().backward()
    assert max(kept) <= query.numel()
