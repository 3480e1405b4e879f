"""Gradients are measured exactly, and the self-check proves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from training_lens.collectors import AdapterGradientsCollector

SECTIONS: list[dict[str, Any]] = [
    {},
    {"lora_dropout": 0.3},
    {"variant": "rslora"},
    {"use_dora": True},
    {"init": "pissa"},
    {"family": "GPT2"},
    {"target_modules": ["embed_tokens", "q_proj"]},
]


def training(loop: Any, model: Any) -> Any:
    return loop(model.train(), [AdapterGradientsCollector()], torch.optim.AdamW(model.parameters(), lr=1e-2))


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_the_self_check_holds_at_every_step_of_training(
    section: dict[str, Any], adapted: Callable[..., Any], loop: Any, ids: Tensor
) -> None:
    of = training(loop, adapted(moved=False, **section))
    for _ in range(4):
        checked = of.step(ids)["adapter_gradients"].scalars["self_check"]
        assert float(checked.max()) <= 1e-5


def test_the_self_check_finds_gradients_of_another_step(adapted: Callable[..., Any], loop: Any, ids: Tensor) -> None:
    of = training(loop, adapted())
    of.model(input_ids=ids, labels=ids).loss.backward()
    stale = of.context.modules[1].a.grad.clone()
    of.update()
    of.model(input_ids=ids.flip(0, 1), labels=ids).loss.backward()
    of.context.modules[1].a.grad = stale
    checked = of.update()["adapter_gradients"].scalars["self_check"]
    assert checked[1] > 1e-2 and float(checked[[0, *range(2, len(checked))]].max()) <= 1e-5


def test_norms_and_cosines_are_those_of_float64(adapted: Callable[..., Any], loop: Any, ids: Tensor) -> None:
    of = training(loop, adapted(use_dora=True))
    previous, mean = None, 0.0
    for i in range(4):
        of.model(input_ids=ids.roll(i), labels=ids).loss.backward()
        grads = [
            [p.grad.double().flatten().clone() for p in module.trained_parameters] for module in of.context.modules
        ]
        found = of.update()["adapter_gradients"].scalars
        for j, name in enumerate(("norm_a", "norm_b", "norm_magnitude")):
            wanted = torch.stack([of_module[j].norm() for of_module in grads])
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-12)
        now = torch.stack([torch.cat(of_module[:2]) for of_module in grads[:1]])  # one module says it for all
        if previous is None:
            assert found["cosine_previous"].isnan().all() and found["cosine_mean"].isnan().all()
        else:
            for name, other in (("cosine_previous", previous), ("cosine_mean", mean)):
                wanted = torch.cosine_similarity(now, other)
                torch.testing.assert_close(found[name][:1].double(), wanted, rtol=1e-5, atol=1e-6)
        previous, mean = now, 0.9 * mean + 0.1 * now


def test_a_constant_gradient_keeps_its_direction(adapted: Callable[..., Any], loop: Any) -> None:
    of = training(loop, adapted())
    for _ in range(3):
        for module in of.context.modules:
            module.a.grad, module.b.grad = torch.ones_like(module.a), torch.ones_like(module.b)
        found = of.update()["adapter_gradients"].scalars
    for name in ("cosine_previous", "cosine_mean"):
        torch.testing.assert_close(found[name], torch.ones_like(found[name]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nonfinite_gradient_affects_its_module_alone(
    bad: float, adapted: Callable[..., Any], loop: Any, ids: Tensor
) -> None:
    of = training(loop, adapted())
    of.optimizer.param_groups[0]["lr"] = 0.0  # AdamW would carry it into the weights
    of.step(ids)
    of.model(input_ids=ids, labels=ids).loss.backward()
    of.context.modules[3].b.grad[0, 0] = bad
    broken = of.update()["adapter_gradients"].scalars
    for name in ("norm_b", "self_check", "cosine_previous", "cosine_mean"):
        assert (~broken[name].isfinite()).nonzero().flatten().tolist() == [3], name
    for module in of.context.modules:
        of.optimizer.state.pop(module.b)
        module.b.data.nan_to_num_(0.01)
    of.step(ids)
    after = of.step(ids)["adapter_gradients"].scalars
    assert after["cosine_mean"].isfinite().all()  # the running mean goes on without it


def test_only_dora_has_gradients_of_magnitudes(adapted: Callable[..., Any], loop: Any, ids: Tensor) -> None:
    assert "norm_magnitude" not in training(loop, adapted()).step(ids)["adapter_gradients"].scalars


def test_a_module_without_a_gradient_has_none(adapted: Callable[..., Any], loop: Any, ids: Tensor) -> None:
    of = training(loop, adapted())
    of.model(input_ids=ids, labels=ids).loss.backward()
    of.context.modules[0].a.grad = of.context.modules[0].b.grad = None
    found = of.update()["adapter_gradients"].scalars
    assert found["norm_a"][0] == found["norm_b"][0] == found["self_check"][0] == 0 and found["norm_b"][1] > 0
