"""Schedules, clipping and the optimizer's state as tensors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from training_lens.config.schema import TrainingSection
from training_lens.training.optimization import (
    build_optimizer,
    clip_,
    default_lr,
    grad_norm,
    lr_at,
    optimizer_tensors,
    restore_optimizer,
)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
def test_warm_up_rises_to_the_peak_and_then_never_rises(scheduler: str) -> None:
    rates = [lr_at(step, 100, 1.0, scheduler, 0.1) for step in range(1, 101)]  # type: ignore[arg-type]
    assert 0 < rates[0] < rates[9] < rates[10] == 1.0
    assert all(b <= a for a, b in pairwise(rates[10:]))
    assert rates[-1] == (1.0 if scheduler == "constant" else pytest.approx(rates[-1])) and rates[-1] > 0


def test_half_way_values() -> None:
    assert lr_at(51, 100, 2.0, "linear", 0.0) == pytest.approx(1.0)
    assert lr_at(51, 100, 2.0, "cosine", 0.0) == pytest.approx(1.0)
    assert lr_at(1, 1, 2.0, "cosine", 0.03) == pytest.approx(1.0)


def test_default_lr_falls_with_width() -> None:
    assert default_lr(2000) == pytest.approx(5e-4)
    assert default_lr(8192) < default_lr(4096) < default_lr(192)


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def test_norm_and_clipping_equal_torchs_own() -> None:
    ours, theirs = parameters(), parameters()
    wanted = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    norm = grad_norm(ours)
    clip_(ours, norm, 0.5)
    torch.testing.assert_close(norm, wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_no_limit_leaves_gradients_alone() -> None:
    given = parameters()
    before = [p.grad.clone() for p in given if p.grad is not None]
    clip_(given, grad_norm(given), None)
    assert all(torch.equal(p.grad, b) for p, b in zip(given, before, strict=True) if p.grad is not None)


def test_optimizer_state_survives_as_tensors() -> None:
    names = ["a", "b"]
    first, second = parameters(), parameters()
    one, two = (build_optimizer(p, TrainingSection(), 0.1) for p in (first, second))
    one.step()
    for parameter, value in zip(second, first, strict=True):
        parameter.data.copy_(value.data)
    restore_optimizer(two, names, {k: v.clone() for k, v in optimizer_tensors(one, names).items()})
    one.step(), two.step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
