"""Kernels in C take what they can compute, and leave the rest to torch with a reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from training_lens.models.fast.native import library as calls


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    calls.load_library.cache_clear()
    yield
    calls.load_library.cache_clear()


def test_without_a_compiler_nothing_is_taken_and_the_log_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO, "training_lens"):
        assert not calls.can_compute(torch.zeros(2))
        assert not calls.can_compute(torch.zeros(3))
    assert [record.message for record in caplog.records] == [
        "norms, gates, attention and softmax are computed by torch, in more passes: "
        "there is no C compiler (no-such-compiler)"
    ]


@pytest.mark.skipif(calls.load_library() is None, reason="no C compiler here")
def test_numbers_of_other_kinds_are_not_taken() -> None:
    assert calls.can_compute(torch.zeros(2), torch.zeros(3))
    assert not calls.can_compute(torch.zeros(2, dtype=torch.float16))
    assert not calls.can_compute(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not calls.can_compute(torch.zeros(2, device="meta"))
