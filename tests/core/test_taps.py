"""Hooks of a foreign loop see what was there before clipping, and the raw loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from training_lens.core.taps import GradientTap, LossTap


def test_a_tap_keeps_the_sum_of_micro_batches_before_clipping() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    tap = GradientTap([weight])
    for scale in (1.0, 2.0):
        (scale * weight).sum().backward()
    torch.nn.utils.clip_grad_norm_([weight], 0.01)
    kept = tap(weight)
    assert kept is not None and kept.tolist() == [3.0] * 3 and float(weight.grad.norm()) < 0.011
    tap.clear()
    assert tap(weight) is None
    tap.remove()
    weight.sum().backward()
    assert tap(weight) is None


def test_a_tap_takes_the_scalers_scale_off() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    tap = GradientTap([weight], lambda: 1024.0)
    (1024.0 * weight).sum().backward()
    kept = tap(weight)
    assert kept is not None and kept.tolist() == [1.0, 1.0]


def test_a_frozen_parameter_has_nothing_to_keep() -> None:
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    assert GradientTap([frozen])(frozen) is None


class Answers(torch.nn.Module):
    """Gives an output as a model of transformers, or TRL's, does."""

    def forward(self, output: Any, num_items_in_batch: Tensor | None = None) -> Any:
        return output


@pytest.mark.parametrize(("given", "wanted"), [({}, 2.0), ({"num_items_in_batch": torch.tensor(9)}, 4.0)])
def test_losses_are_averaged_or_summed_as_they_were_divided(given: dict[str, Any], wanted: float) -> None:
    model = Answers().train()
    tap = LossTap(model)
    for loss in (1.0, 3.0):
        model(SimpleNamespace(loss=torch.tensor(loss)), **given)
    taken = tap.take()
    assert taken is not None and float(taken) == wanted and tap.take() is None


def test_log_probabilities_are_divided_by_their_labels() -> None:
    model = Answers().train()
    tap = LossTap(model)
    for values in ([-1.0, -2.0], [-3.0, 0.0]):
        mask = torch.tensor([v != 0 for v in values])
        model(SimpleNamespace(log_probs=torch.tensor(values), label_mask=mask))
    assert float(tap.take()) == 2.0


def test_a_nan_loss_stays_nan_and_judging_is_not_read() -> None:
    model = Answers().train()
    tap = LossTap(model)
    model(SimpleNamespace(loss=torch.tensor(torch.nan)))
    assert torch.isnan(tap.take())
    with torch.no_grad():
        model(SimpleNamespace(loss=torch.tensor(1.0)))
    model.eval()(SimpleNamespace(loss=torch.tensor(1.0)))
    assert tap.take() is None
    model.train()
    tap.remove()
    model(SimpleNamespace(loss=torch.tensor(1.0)))
    assert tap.take() is None
