"""Attention of new tokens is that over the columns that each sees, whatever else the cache holds."""

from __future__ import annotations

import pytest
import torch
from pairwise import pairwise  # type: ignore[import-not-found]
from torch import Tensor

from training_lens.models.fast.kv_cache import Columns, SlotLayer
from training_lens.models.fast.native import library as calls
from training_lens.models.fast.native.attention_kernels import ScoreSpec
from training_lens.models.fast.native.decoding_kernels import (
    FewRowsLinear,
    LoRABranches,
    attend_newest_tokens,
)

pytestmark = pytest.mark.skipif(calls.load_library() is None, reason="no C compiler here")
HELD, NEW = [36, 0, 6], [1, 3, 8]  # tokens of three rows before the step, and of it
ENDS = [
    (row, held + i + 1) for row, (held, new) in enumerate(zip(HELD, NEW, strict=True)) for i in range(new)
]  # of each token


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Of (rows, heads, size): the halves of the first angles of each head, or neighbours."""
    first, second, rest = x.tensor_split([cos.shape[1] // 2, cos.shape[1]], dim=-1)
    if interleaved:
        first, second = x[..., : cos.shape[1] : 2], x[..., 1 : cos.shape[1] : 2]
        cos, sin = (t[:, None, ::2] for t in (cos, sin))
        return torch.cat(
            [torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2), rest], -1
        )
    cos, sin = (t[:, None, : first.shape[-1]] for t in (cos, sin))
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def token_by_token(query: Tensor, keys: Tensor, values: Tensor, scores: ScoreSpec) -> Tensor:
    shared = query.shape[1] // keys.shape[1]
    found = torch.empty_like(query)
    for token, (row, end) in enumerate(ENDS):
        begin = max(0, end - scores.window if scores.window else 0)
        for head in range(query.shape[1]):
            k, v = (held[row, head // shared, begin:end] for held in (keys, values))
            s = scores.scale * k @ query[token, head]
            s = s if scores.softcap is None else scores.softcap * (s / scores.softcap).tanh()
            found[token, head] = s.softmax(0) @ v
    return found


EXACTNESS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.04}


@pytest.mark.parametrize(
    ("dtype", "size", "window", "softcap", "interleaved"),
    pairwise(list(EXACTNESS), [20, 64, 80, 128], [None, 1, 9, 100], [None, 0.8], [False, True]),
)
def test_new_tokens_see_their_rows_columns_alone(
    dtype: torch.dtype, size: int, window: int | None, softcap: float | None, interleaved: bool
) -> None:
    most, scores, tokens = EXACTNESS[dtype], ScoreSpec(0.3, window, softcap), len(ENDS)
    together, keys, values = (
        drawn(tokens, 8, size, seed=0),
        drawn(3, 2, 48, size, seed=1),
        drawn(3, 2, 48, size, seed=2),
    )
    angles = drawn(tokens, 16 if size == 80 else size // 2, seed=3)
    angles = angles.repeat_interleave(2, 1) if interleaved else angles.repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    query, key, value = together.to(dtype).split([4, 2, 2], dim=1)
    keys, values = keys.to(dtype), values.to(dtype)
    columns = Columns(3, 48, window, torch.device("cpu"))
    columns.lengths = HELD[:]
    for row, length in enumerate(HELD):  # what it must not read
        keys[row, :, length:], values[row, :, length:] = torch.nan, torch.nan
    columns.open_tokens(NEW)
    layer = SlotLayer(columns, windowed=False)
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    before = keys.clone(), values.clone()
    found = attend_newest_tokens((query, key, value), (cos, sin), interleaved, layer, scores)
    rotated = turned(key.double(), cos, sin, interleaved)
    for token, (row, end) in enumerate(ENDS):
        torch.testing.assert_close(keys[row, :, end - 1].double(), rotated[token], rtol=0, atol=most)
        assert torch.equal(values[row, :, end - 1], value[token])
    assert all(keys[row, :, held + new :].isnan().all() for row, (held, new) in enumerate(zip(HELD, NEW, strict=True)))
    wanted = token_by_token(turned(query.double(), cos, sin, interleaved), keys.double(), values.double(), scores)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=most)
    layer.keys, layer.values = before
    for step in range(max(NEW)):  # one at a time gives the same bits
        now = [(token, row) for token, (row, end) in enumerate(ENDS) if end - 1 == HELD[row] + step]
        columns.lengths = [held + min(step, new) for held, new in zip(HELD, NEW, strict=True)]
        columns.open_tokens([int(new > step) for new in NEW])
        of = [token for token, _ in now]
        alone = attend_newest_tokens((query[of], key[of], value[of]), (cos[of], sin[of]), interleaved, layer, scores)
        assert torch.equal(alone, found[of])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_branches_side_by_side_go_to_their_own_outputs(dtype: torch.dtype, most: float, rows: int) -> None:
    sizes = [(3, 70), (0, 5), (8, 64), (2, 1)]  # rank, outputs
    factors = [(drawn(r, 20, seed=i), drawn(out, r, seed=10 + i)) for i, (r, out) in enumerate(sizes)]
    x, y = drawn(rows, 20, seed=7).to(dtype), drawn(rows, 140, seed=8).to(dtype)
    wanted = y.double() + torch.cat([x.double() @ down.T @ up.T for down, up in factors], 1)
    LoRABranches(factors, dtype).add_to(x, y)
    torch.testing.assert_close(y.double(), wanted, rtol=most, atol=most)


@pytest.mark.skipif(
    not calls.has_kernel("few_rows", torch.bfloat16), reason="this processor multiplies no pairs of bfloat16"
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 64])
def test_few_rows_are_multiplied_by_plain_weights_and_rounded_once(rows: int, biased: bool) -> None:
    weights = [drawn(outs, 96, seed=outs).bfloat16() for outs in (12, 4, 32)]
    bias = drawn(48, seed=3).bfloat16() if biased else None
    x = drawn(rows, 1, 96, seed=5).bfloat16()
    assert FewRowsLinear.can_compute(weights, bias)
    product = FewRowsLinear(weights, bias)
    found = product(x)
    wanted = torch.nn.functional.linear(
        x.double(), torch.cat(weights).double(), None if bias is None else bias.double()
    )
    assert found.shape == (rows, 1, 48)
    assert (found == wanted.bfloat16()).float().mean() > 0.99  # what falls between two may go either way
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-5)
    assert torch.equal(product(x[-1:]), found[-1:])  # whatever is beside a row


def test_few_rows_leave_other_weights_alone() -> None:
    plain = torch.zeros(8, 64, dtype=torch.bfloat16)
    for weight in (plain.float(), plain[:, :48], torch.zeros(8, 48).bfloat16(), torch.zeros(6, 64).bfloat16(), plain.T):
        assert not FewRowsLinear.can_compute([weight], None)
    assert not FewRowsLinear.can_compute([plain], torch.zeros(8))
    assert not FewRowsLinear.can_compute([plain] * 9, None)


@pytest.mark.skipif(
    not calls.has_kernel("few_rows", torch.bfloat16), reason="this processor multiplies no pairs of bfloat16"
)
@pytest.mark.parametrize("x", [torch.zeros(2, 128).bfloat16(), torch.zeros(2, 32).bfloat16(), torch.zeros(2, 64)])
def test_rows_that_do_not_fit_the_weights_are_refused(x: Tensor) -> None:
    product = FewRowsLinear([torch.zeros(8, 64, dtype=torch.bfloat16)], None)
    with pytest.raises(ValueError, match="for weights of 64"):
        product(x)
