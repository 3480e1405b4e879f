"""Modes of a model's parts."""

from __future__ import annotations

import pytest
import torch

from training_lens.models.model_classes import evaluation_mode


def test_evaluation_mode_restores_the_mode_of_each_part() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    model[2].eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [m.training for m in model] == [True, True, False] and model.training
    with pytest.raises(RuntimeError), evaluation_mode(model):
        raise RuntimeError
    assert model[0].training and not model[2].training
