"""Faults planted in a loop of one's own: each is found, and named with its own cause rather than with another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny_models import tiny_model
from training_lens.analysis.findings import Finding, diagnose
from training_lens.analysis.open_recording import open_recording
from training_lens.core.framework import TrainingLensFramework

Change = Callable[[Any], None]
Step = Callable[[Any, torch.optim.Optimizer, torch.Tensor], torch.Tensor]


def train_step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss


def watch(
    folder: Path, change: Change = lambda _: None, step: Step = train_step, steps: int = 60
) -> dict[str, Finding]:
    """The findings, by code, of a tiny model that learns eight sequences."""
    model = get_peft_model(tiny_model(num_hidden_layers=4), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.train()
    change(model)
    rows = torch.randint(0, 97, (8, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    lens = TrainingLensFramework(folder / "lens", probe=[{"input_ids": row} for row in rows])
    with lens.watch(model, optimizer):
        for number in range(steps):
            lens.step(step(model, optimizer, rows[number % 2 :: 2]))
    return {found.code: found for found in diagnose(open_recording(folder / "lens"))}


def accused(findings: dict[str, Finding]) -> set[str]:
    return {code for code, found in findings.items() if found.severity in ("problem", "warning")}


def test_a_sound_loop_is_not_accused(tmp_path: Path) -> None:
    findings = watch(tmp_path)
    assert not accused(findings) and findings["self_check"].severity == "fine"


@pytest.mark.slow
def test_zero_grad_that_is_left_out(tmp_path: Path) -> None:
    def keep_gradients(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss

    found = watch(tmp_path, step=keep_gradients)["self_check"]
    assert found.severity == "problem" and "zero_grad" in found.action and "earlier steps" in found.title


@pytest.mark.slow
def test_all_labels_masked(tmp_path: Path) -> None:
    def mask(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
        loss.backward()
        optimizer.step()
        return loss

    findings = watch(tmp_path, step=mask)
    assert "masked" in findings["nonfinite"].action and "masked" in findings["untrained"].action
    assert "requires_grad" not in findings["untrained"].action
    assert findings["rate_high"].severity not in ("problem", "warning")


def test_a_frozen_b(tmp_path: Path) -> None:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.requires_grad_(False)

    findings = watch(tmp_path, freeze)
    assert accused(findings) == {"untrained"} and "B require gradients" in findings["untrained"].action


@pytest.mark.parametrize(("frozen", "severity"), [("lora_A", "note"), ("lora_B", "warning")])
def test_one_factor_that_is_frozen_after_its_start(tmp_path: Path, frozen: str, severity: str) -> None:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
            if frozen in name:
                parameter.requires_grad_(False)

    found = watch(tmp_path, freeze)["self_check"]
    assert found.severity == severity and found.title.startswith(f"{frozen[-1]} of 8 modules gets no gradient")


@pytest.mark.parametrize("place", ["q_proj.base_layer", "embed_tokens"])
def test_nan_in_a_weight_of_the_base(tmp_path: Path, place: str) -> None:
    def break_weight(model: Any) -> None:
        weights = [p for name, p in model.named_parameters() if place in name]
        with torch.no_grad():
            weights[-1].view(-1)[:] = torch.nan

    found = watch(tmp_path, break_weight, steps=4)["nonfinite"]
    assert found.title == "The base model is not finite" and "rate" in found.action and "lower" not in found.action
