"""Schedules, clipping and the optimizer's state as tensors."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from training_lens.config.schema import TrainingSection
from training_lens.errors import ConfigurationError
from training_lens.training.loop.lr_schedule import default_lr, lr_at
from training_lens.training.loop.optimizer import (
    build_optimizer,
    clip_gradients,
    grad_norm,
    optimizer_tensors,
    restore_optimizer,
)


def rates(steps: int, **settings: Any) -> list[float]:
    training = TrainingSection(**{"lr": 1.0, "warmup_ratio": 0.1, **settings})
    return [lr_at(step, steps, training) for step in range(1, steps + 1)]


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "cosine_with_restarts", "constant"])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_warm_up_rises_to_the_peak_then_the_rate_falls_to_its_floor(scheduler: str, floor: float) -> None:
    if scheduler == "constant" and floor:
        pytest.skip("a constant rate has no floor")
    given = rates(100, scheduler=scheduler, min_lr_ratio=floor)
    assert 0 < given[0] < given[9] < given[10] == 1.0
    assert all(b <= a for a, b in pairwise(given[10:]))
    assert given[-1] == (1.0 if scheduler == "constant" else pytest.approx(floor, abs=0.02)) and given[-1] > floor


@pytest.mark.parametrize("cycles", [1, 2, 3, 7])
def test_restarts_peak_at_the_start_of_each_cycle_and_fall_within_it(cycles: int) -> None:
    steps = 21 * cycles
    given = rates(steps, scheduler="cosine_with_restarts", scheduler_cycles=cycles, warmup_ratio=0.0, min_lr_ratio=0.1)
    assert [i for i, rate in enumerate(given) if rate == 1.0] == [21 * cycle for cycle in range(cycles)]
    for cycle in range(cycles):
        one = given[21 * cycle : 21 * (cycle + 1)]
        assert all(b < a for a, b in pairwise(one)) and 0.1 < one[-1] < 0.12
        assert one == pytest.approx(rates(21, scheduler="cosine", warmup_ratio=0.0, min_lr_ratio=0.1))


def test_half_way_values() -> None:
    for scheduler in ("linear", "cosine"):
        assert rates(100, lr=0.5, scheduler=scheduler, warmup_ratio=0.0)[50] == pytest.approx(0.25)
    assert rates(1, lr=0.5, warmup_ratio=0.03) == [0.25]


def test_default_lr_falls_with_width() -> None:
    assert default_lr(2000) == pytest.approx(5e-4)
    assert default_lr(8192) < default_lr(4096) < default_lr(192)


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((3, 4), (5,), (80, 80), (80, 80))]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def test_norm_and_clipping_equal_torchs_own() -> None:
    ours, theirs = parameters(), parameters()
    wanted = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    norm = grad_norm(ours)
    clip_gradients(ours, norm, 0.5)
    torch.testing.assert_close(norm, wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_no_limit_leaves_gradients_alone() -> None:
    given = parameters()
    before = [p.grad.clone() for p in given if p.grad is not None]
    clip_gradients(given, grad_norm(given), None)
    assert all(torch.equal(p.grad, b) for p, b in zip(given, before, strict=True) if p.grad is not None)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw_8bit"])
@pytest.mark.parametrize("ratio", [None, 8.0])
def test_optimizer_state_survives_as_tensors(optimizer: Any, ratio: float | None, tmp_path: Path) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    names = ["x.lora_A.w", "x.lora_B.w", "y.lora_B.w", "y.lora_A.w"]
    training = TrainingSection(lr=0.1, optimizer=optimizer, weight_decay=0.01)
    first, second = parameters(), parameters()
    one, two = (build_optimizer(list(zip(names, p, strict=True)), training, ratio) for p in (first, second))
    one.step(), one.step()
    for parameter, value in zip(second, first, strict=True):
        parameter.data.copy_(value.data)
    save_file(optimizer_tensors(one), tmp_path / "state")
    restore_optimizer(two, load_file(tmp_path / "state"))
    one.step(), two.step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_lora_plus_scales_the_rate_of_b_alone() -> None:
    named = list(zip(["q.lora_A.default.weight", "q.lora_B.default.weight"], parameters()[2:], strict=True))
    optimizer = build_optimizer(named, TrainingSection(lr=0.1), 16.0)
    factors = {name: group["lr_factor"] for group in optimizer.param_groups for name in group["param_names"]}
    assert factors == {"q.lora_A.default.weight": 1.0, "q.lora_B.default.weight": 16.0}


def test_a_missing_package_is_one_line_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python marks a package that cannot be imported
    with pytest.raises(ConfigurationError, match=r"training.optimizer: needs .*pip install 'training-lens\[quantiz"):
        build_optimizer([("a", parameters()[0])], TrainingSection(lr=0.1, optimizer="adamw_8bit"))
