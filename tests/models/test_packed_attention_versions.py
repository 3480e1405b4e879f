"""Packed attention takes torch's flash kernel where this torch and this device have it, and else computes the same."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from training_lens.models.fast import packed_attention
from training_lens.models.fast.native.attention_kernels import PackedSequences, ScoreSpec
from training_lens.models.fast.packed_attention import _attend_each_example, _attend_with_varlen, find_varlen

PACKED = PackedSequences((5, 3, 8))
SCORES = ScoreSpec(0.3)


def attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float, window: Any) -> Tensor:
    """What the flash kernel computes, in float32 on the CPU."""
    assert key.shape[1] == query.shape[1] and cu_seqlens.dtype == torch.int32
    found = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (t[start:end].transpose(0, 1).float() for t in (query, key, value))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if window[0] < 0 else seen.triu(-window[0])
        found.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(0, 1))
    return torch.cat(found).to(query.dtype)


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    raise AssertionError("takes no scale")


def varlen_2_11(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return attend(query, key, value, cu_seq_q, scale, window_size)


def varlen_2_12(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    return attend(query, key, value, cu_seq_q, scale, window_size)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Make this function torch's varlen_attn; None: a torch without the module."""

    def put(function: Any) -> None:
        module = ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None if function is None else module)
        find_varlen.cache_clear()

    yield put
    find_varlen.cache_clear()


@pytest.mark.parametrize("function", [varlen_2_11, varlen_2_12])
@pytest.mark.parametrize(("groups", "window"), [(1, None), (2, 3), (4, None)])
def test_each_form_of_varlen_attn_gets_what_it_takes(
    install: Callable[[Any], None], function: Any, groups: int, window: int | None
) -> None:
    install(function)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(16, n, 8, generator=generator) for n in (4, groups, groups))
    scores = ScoreSpec(0.3, window)
    found = _attend_with_varlen(query, key, value, PACKED, scores)
    torch.testing.assert_close(found, _attend_each_example(query, key, value, PACKED, scores))


@pytest.mark.parametrize("function", [None, varlen_2_10])
def test_a_torch_without_it_attends_to_one_example_after_the_other_and_says_why(
    install: Callable[[Any], None], function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    install(function)
    with caplog.at_level("INFO"):
        assert find_varlen() is None
    assert "packed examples attend one by one" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "size", "softcap", "capability", "expected"),
    [
        (torch.bfloat16, 64, None, (8, 0), True),
        (torch.float16, 256, None, (9, 0), True),
        (torch.bfloat16, 64, None, (7, 5), False),  # T4
        (torch.float32, 64, None, (9, 0), False),
        (torch.bfloat16, 64, 50.0, (9, 0), False),
        (torch.bfloat16, 512, None, (9, 0), False),
        (torch.bfloat16, 20, None, (9, 0), False),
    ],
)
def test_the_flash_kernel_is_asked_only_for_what_it_computes(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, size: int, softcap: Any, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    with torch._subclasses.FakeTensorMode():
        query = torch.empty(16, 4, size, dtype=dtype, device="cuda")
        assert packed_attention.can_use_varlen(query, ScoreSpec(0.3, softcap=softcap)) is expected


def test_this_torch_has_the_form_of_2_12() -> None:
    """A later torch with other names for these fails here, and not in a user's first step."""
    assert set(inspect.signature(varlen_2_12).parameters) <= set(inspect.signature(varlen.varlen_attn).parameters)
