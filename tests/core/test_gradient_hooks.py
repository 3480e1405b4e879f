"""Hooks on another loop read gradients before clipping, and the raw loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from training_lens.core.gradient_hooks import GradientHooks, LossHook


def test_hooks_keep_the_sum_of_micro_batches_before_clipping() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    hooks = GradientHooks([weight])
    for scale in (1.0, 2.0):
        (scale * weight).sum().backward()
    torch.nn.utils.clip_grad_norm_([weight], 0.01)
    kept = hooks(weight)
    assert kept is not None and kept.tolist() == [3.0] * 3 and float(weight.grad.norm()) < 0.011
    hooks.clear()
    assert hooks(weight) is None
    hooks.remove()
    weight.sum().backward()
    assert hooks(weight) is None


def test_a_parameter_that_only_an_early_micro_batch_reaches_keeps_that_gradient() -> None:
    from accelerate.state import GradientState

    expert, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    hooks, state = GradientHooks([expert, other]), GradientState()
    before = state.sync_gradients
    try:
        for reached, last in ((expert, False), (other, True)):  # an expert that gets no token of the last one
            state._set_sync_gradients(last)
            reached.sum().backward()
    finally:
        state._set_sync_gradients(before)
    assert all(kept is not None and kept.tolist() == [1.0, 1.0] for kept in (hooks(expert), hooks(other)))


def test_hooks_unscale_gradients_and_read_the_scale_once_a_step() -> None:
    weights, asked = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)], []
    hooks = GradientHooks(weights, lambda: asked.append(1) or 1024.0)
    for step in (1, 2):
        (1024.0 * sum(weights)).sum().backward()
        assert all(float((hooks(w) / step - 1).abs().max()) == 0 for w in weights)
        assert len(asked) == step
        hooks.clear()


def test_a_frozen_parameter_has_no_hook() -> None:
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    assert GradientHooks([frozen])(frozen) is None


class Answers(torch.nn.Module):
    """Gives an output as a model of transformers, or TRL's, does."""

    def forward(self, output: Any, num_items_in_batch: Tensor | None = None) -> Any:
        return output


def number(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


@pytest.mark.parametrize(("given", "wanted"), [({}, 2.0), ({"num_items_in_batch": torch.tensor(9)}, 4.0)])
def test_losses_are_averaged_or_summed_as_they_were_divided(given: dict[str, Any], wanted: float) -> None:
    model = Answers().train()
    hooks = LossHook(model)
    for loss in (1.0, 3.0):
        model(SimpleNamespace(loss=number(loss)), **given).loss.backward()
    taken = hooks.take_loss()
    assert taken is not None and float(taken) == wanted and hooks.take_loss() is None


def scores(values: list[float]) -> SimpleNamespace:
    mask = torch.tensor([v != 0 for v in values])
    return SimpleNamespace(log_probs=torch.tensor(values, requires_grad=True), label_mask=mask)


def test_log_probabilities_are_divided_by_their_labels() -> None:
    model = Answers().train()
    hooks = LossHook(model)
    for values in ([-1.0, -2.0], [-3.0, 0.0]):
        (-model(scores(values)).log_probs.sum() / 3).backward()
    taken = hooks.take_loss()
    assert taken is not None and float(taken) == 2.0


def test_a_loss_without_a_backward_pass_does_not_count() -> None:
    model = Answers().train()
    hooks = LossHook(model)
    other = number(2.0)
    model(SimpleNamespace(loss=number(1.0), other=other)).other.backward()
    assert hooks.take_loss() is None
    preferred = torch.tensor([1.0, -1.0])  # as DPO weighs the chosen and the rejected answer
    (model(scores([-1.0, -2.0])).log_probs * preferred).sum().backward()
    assert hooks.take_loss() is None


def test_a_nan_loss_stays_nan_and_validation_is_not_read() -> None:
    model = Answers().train()
    hooks = LossHook(model)
    model(SimpleNamespace(loss=number(torch.nan))).loss.backward()
    taken = hooks.take_loss()
    assert taken is not None and torch.isnan(taken)
    with torch.no_grad():
        model(SimpleNamespace(loss=number(1.0)))
    model.eval()(SimpleNamespace(loss=number(1.0))).loss.backward()
    assert hooks.take_loss() is None
    model.train()
    hooks.remove()
    model(SimpleNamespace(loss=number(1.0))).loss.backward()
    assert hooks.take_loss() is None
