"""Short real trainings of the packaged model: those with a symptom are found, the sound one is not accused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from slow_cases import mark_slow

from training_lens.analysis.findings import Finding, diagnose
from training_lens.core.recording import Recording

Train = Callable[..., Recording]


@pytest.fixture(scope="module")
def sound(train: Train) -> dict[str, Finding]:
    """At the rate that the package would choose itself."""
    return by_code(train(rows=200))


def by_code(recording: Recording) -> dict[str, Finding]:
    return {found.code: found for found in diagnose(recording)}


def accused(found: dict[str, Finding]) -> set[str]:
    return {code for code, each in found.items() if each.severity in ("problem", "warning")}


@pytest.mark.slow
def test_a_sound_run_is_not_accused(sound: dict[str, Finding]) -> None:
    assert not accused(sound)
    decided = {code for code, each in sound.items() if each.severity == "fine"}
    assert decided >= {"untrained", "nonfinite", "layers", "rate_high", "rate_low", "rank"}


@pytest.mark.slow
def test_a_rate_a_hundred_times_too_high(train: Train) -> None:
    found = by_code(train(lr=0.3, rows=140))["rate_high"]
    # Whether the loss comes back below its start, which makes it a warning, depends on the processor's last bits.
    assert found.severity in ("problem", "warning") and len(found.evidence["signs"]) >= 2


@pytest.mark.slow
def test_a_rate_a_hundred_times_too_low(train: Train) -> None:
    found = by_code(train(lr=3e-5, rows=200, evals=10))
    assert accused(found) == {"rate_low"} and found["rate_low"].evidence["straightness"] > 0.8


@pytest.mark.parametrize("peft", [{"use_dora": True}, mark_slow({"init": "pissa"})], ids=["dora", "pissa"])
def test_a_layer_that_is_frozen_is_named(train: Train, peft: dict[str, Any]) -> None:
    def freeze(model: Any, step: int) -> None:
        for name, parameter in model.named_parameters():
            if "layers.2." in name:
                parameter.requires_grad_(False)

    recording = train(rows=16, change=freeze, **peft)
    found = by_code(recording)["untrained"]
    assert found.severity == "warning" and "no gradient reaches them" in found.action
    assert found.evidence["modules"] == [m.name for m in recording.modules if m.layer == 2]


@pytest.mark.slow
def test_a_layer_that_breaks_is_named(train: Train) -> None:
    def swell(model: Any, step: int) -> None:
        if step == 10:
            with torch.no_grad():
                model.base_model.model.model.layers[3].mlp.up_proj.lora_B["default"].weight.mul_(1e4)

    found = by_code(train(rows=80, change=swell))
    assert found["layers"].severity == "problem"


@pytest.mark.slow
def test_eight_rows_again_and_again_are_learned_by_heart(train: Train) -> None:
    found = by_code(train(rows=8, epochs=40, lr=6e-3, evals=10))["memorization"]
    assert found.severity == "warning" and found.evidence["rise"] > 0
