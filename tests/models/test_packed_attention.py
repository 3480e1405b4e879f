"""Attention of packed examples equals attention of each example alone."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from pairwise import pairwise  # type: ignore[import-not-found]
from torch import Tensor

from training_lens.models.fast import packed_attention
from training_lens.models.fast.native.attention_kernels import PackedSequences, ScoreSpec

attend = jaxtyped(typechecker=beartype)(packed_attention.packed_attention)
LENGTHS = PackedSequences((4, 1, 6))
pytestmark = pytest.mark.usefixtures("both_ways")


def drawn(heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(11, heads, 3, generator=generator, dtype=torch.float64).requires_grad_()


def alone(
    query: Tensor, key: Tensor, value: Tensor, scores: ScoreSpec, packed: PackedSequences = LENGTHS
) -> Tensor:  # fmt: skip
    """The formula for one example after the other, with an explicit mask."""
    found = []
    for start, end in packed.spans:
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))  # (heads, tokens, size)
        k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        s = scores.scale * q @ k.transpose(1, 2)
        s = s if scores.softcap is None else scores.softcap * (s / scores.softcap).tanh()
        s = s.masked_fill((back < 0) | (back >= (scores.window or 1000)), -torch.inf)
        found.append((s.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("softcap", [None, 0.9])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_each_example_alone_and_so_does_its_gradient(
    groups: int, window: int | None, softcap: float | None
) -> None:
    scores = ScoreSpec(0.7, window, softcap)
    given = drawn(4, 0), drawn(groups, 1), drawn(groups, 2)
    found, wanted = attend(*given, LENGTHS, scores), alone(*given, scores)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    of_output = drawn(4, 3).detach()
    gradients = (torch.autograd.grad(output, given, of_output) for output in (found, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


EXACTNESS = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.06}


@pytest.mark.parametrize(
    ("lengths", "width", "window", "softcap", "dtype"),
    pairwise(
        [(32,), (33, 1, 100), (64, 31), (600, 257)], [21, 64, 80], [None, 1, 40, 300], [None, 5.0], list(EXACTNESS)
    ),
)
def test_blocks_and_heads_of_any_size_are_exact(
    lengths: tuple[int, ...], width: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    most, scores = EXACTNESS[dtype], ScoreSpec(0.7, window, softcap)
    packed = PackedSequences(lengths)
    together = torch.randn(sum(lengths), 8, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = together.to(dtype).requires_grad_()  # queries, keys and values lie between each other
    found = attend(*given.split([4, 2, 2], 1), packed, scores)
    wide = given.detach().double().requires_grad_()
    wanted = alone(*wide.split([4, 2, 2], 1), scores, packed)
    dout = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found.backward(dout)
    wanted.backward(dout.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=most)
    torch.testing.assert_close(given.grad.double(), wide.grad, rtol=most, atol=2 * most)


def test_packed_sequences_count_positions_from_each_example() -> None:
    device = torch.device("cpu")
    assert LENGTHS.position_ids(device).tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]]
    assert LENGTHS.cu_seqlens(device).tolist() == [0, 4, 5, 11]
    assert LENGTHS.spans == [(0, 4), (4, 5), (5, 11)]


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_long_example_keeps_no_weights(softcap: float | None, request: pytest.FixtureRequest) -> None:
    if softcap and "by torch" in request.node.name:
        pytest.skip("torch has no capped attention that forgets its weights")
    query, key, value = (torch.randn(1200, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        attend(query, key, value, PackedSequences((1200,)), ScoreSpec(0.3, None, softcap)).sum().backward()
    assert max(kept) <= query.numel()
