"""Adam's update is computed from the gradients that it took."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from training_lens.collectors import OptimizerStateCollector


def parameters(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("section", [{}, {"use_dora": True}, {"init": "pissa"}, {"family": "GPT2"}], ids=str)
def test_update_rms_is_that_of_clipped_gradients_and_unbiased_moments(
    section: dict[str, Any], adapted: Callable[..., Any], loop: Any, ids: Tensor
) -> None:
    model, beta2, eps = adapted(**section), 0.95, 1e-6
    of = loop(model, [OptimizerStateCollector()], torch.optim.AdamW(parameters(model), 1e-2, (0.9, beta2), eps))
    moments = {m.name: [torch.zeros(m.a.shape).double(), torch.zeros(m.b.shape).double()] for m in of.context.modules}
    for step in range(1, 4):
        of.model(input_ids=ids.roll(step), labels=ids).loss.backward()
        norm = torch.stack([p.grad.norm() for p in parameters(model)]).norm()
        clip = 0.1 / float(norm)
        assert clip < 1  # the step is clipped
        grads = {m.name: [clip * m.a.grad.double(), clip * m.b.grad.double()] for m in of.context.modules}
        found = of.update(clip=0.1)["optimizer_state"].scalars
        for i, module in enumerate(of.context.modules):
            for j, part in enumerate("ab"):
                g, v = grads[module.name][j], moments[module.name][j]
                v.mul_(beta2).add_((1 - beta2) * g.square())
                wanted = (g.square() / (v / (1 - beta2**step)).clamp(min=eps**2)).mean().sqrt()
                torch.testing.assert_close(found[f"update_rms_{part}"][i].double(), wanted, rtol=1e-4, atol=1e-7)


def test_a_constant_gradient_gives_1(adapted: Callable[..., Any], loop: Any) -> None:
    model = adapted()
    of = loop(model, [OptimizerStateCollector()], torch.optim.AdamW(parameters(model), lr=1e-3))
    for _ in range(3):
        for p in parameters(model):
            p.grad = torch.full_like(p, 0.3)
        found = of.update()["optimizer_state"].scalars
        for values in found.values():
            torch.testing.assert_close(values, torch.ones_like(values))


def test_a_parameter_without_a_gradient_is_unknown(adapted: Callable[..., Any], loop: Any, ids: Tensor) -> None:
    model = adapted()
    of = loop(model, [OptimizerStateCollector()], torch.optim.AdamW(parameters(model), lr=1e-3))
    of.model(input_ids=ids, labels=ids).loss.backward()
    of.context.modules[1].a.grad = None
    found = of.update()["optimizer_state"].scalars
    assert found["update_rms_a"].isnan().nonzero().flatten().tolist() == [1]
    assert found["update_rms_b"].isfinite().all()


OTHERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(parameters(model), lr=1e-3),
    "Adafactor": lambda model: torch.optim.Adafactor(parameters(model), lr=1e-3),
    "RMSprop": lambda model: torch.optim.RMSprop(parameters(model), lr=1e-3),
    "AdamW": lambda model: torch.optim.AdamW(
        [{"params": parameters(model)[:1], "eps": 1e-6}, {"params": parameters(model)[1:]}]
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_optimizers_give_nothing_and_one_log_line(
    kind: str, adapted: Callable[..., Any], loop: Any, ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted()
    of = loop(model, [OptimizerStateCollector()], OTHERS[kind](model))
    with caplog.at_level(logging.INFO, "training_lens"):
        assert [of.step(ids), of.step(ids)] == [{}, {}]
    assert [record.getMessage() for record in caplog.records].count(
        f"the lens captures no optimizer_state: {kind} keeps no float exp_avg_sq with one eps"
    ) == 1


def test_an_optimizer_of_other_parameters_gives_nothing(adapted: Callable[..., Any], loop: Any) -> None:
    other = torch.nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    assert loop(adapted(), [OptimizerStateCollector()], torch.optim.AdamW([other])).update() == {}


def test_a_parameter_that_adam_does_not_step_is_unknown_and_the_rest_is_captured(
    adapted: Callable[..., Any], loop: Any, ids: Tensor
) -> None:
    model = adapted()
    frozen = next(p for p in parameters(model)).requires_grad_(False)
    of = loop(model, [OptimizerStateCollector()], torch.optim.AdamW(parameters(model), lr=1e-3))
    of.model(input_ids=ids, labels=ids).loss.backward()
    found = of.update()["optimizer_state"].scalars
    assert frozen is of.context.modules[0].a
    assert found["update_rms_a"].isnan().nonzero().flatten().tolist() == [0]
    assert found["update_rms_b"].isfinite().all()
