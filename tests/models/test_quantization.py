"""Quantized bases train on the CPU too: forward, backward, and the base alone as it was."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_cases import slow_but

from training_lens import TrainingConfig, TrainingWrapper, embedded
from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import AdapterError, ConfigurationError
from training_lens.models.adapters import (
    attach,
    base_only,
    count_parameters,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from training_lens.models.factory import load_model
from training_lens.models.fast.engine import Engine
from training_lens.models.fast.install import uninstall_kernels
from training_lens.models.fast.tolerance import relative_error

CPU = torch.device("cpu")
IDS = torch.arange(40, 72).view(2, 16)
Config = Callable[..., TrainingConfig]


def quantized(bits: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return load_model(ModelSection(quantization=bits), CPU, "fp32")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_linear_layers_but_the_head_are_packed_and_close_to_the_whole(bits: str) -> None:
    model, whole = quantized(bits), load_model(ModelSection(), CPU, "fp32")
    packed = {n.rsplit(".", 2)[-2] for n, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert packed == {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}
    assert not any(p.requires_grad for p in model.parameters())
    difference = (logits(model) - logits(whole)).norm() / logits(whole).norm()
    assert 0 < difference < (0.2 if bits == "4bit" else 0.05)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_packed_weights_count_one_by_one(bits: str) -> None:
    wanted = count_parameters(load_model(ModelSection(), CPU, "fp32")).total
    assert count_parameters(quantized(bits)).total == wanted


@pytest.mark.parametrize(
    ("peft", "precision"), slow_but([({}, "fp32")], [({}, "fp32"), ({"use_dora": True}, "fp32"), ({}, "bf16")]), ids=str
)
def test_packed_examples_train_as_each_alone(peft: dict[str, Any], precision: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = attach(load_model(ModelSection(quantization="4bit"), CPU, precision), PeftSection(r=4, **peft)).eval()
    for name, parameter in trainable_parameters(model):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    engine = Engine(model)
    assert engine.can_pack and not engine.kernels.skipped, engine.kernels
    mask = torch.ones_like(IDS, dtype=torch.bool)

    def loss_and_gradients(*given: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = engine.loss_sum(*given)
        loss.backward()
        return loss.detach(), [p.grad.clone() for _, p in trainable_parameters(model) if p.grad is not None]

    packed, gradients = loss_and_gradients(IDS.view(1, -1), mask.view(1, -1), (16, 16))
    uninstall_kernels(model)
    padded, wanted = loss_and_gradients(IDS, mask)
    assert len(gradients) == len(wanted) > 40
    torch.testing.assert_close(packed, padded, rtol={"fp32": 1e-5, "bf16": 3e-2}[precision], atol=0)
    if precision == "fp32":  # bf16 has few digits of gradients so far from the model's own texts
        for found, expected in zip(gradients, wanted, strict=True):
            assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("bits", "dora"), slow_but([("4bit", True)], [("4bit", False), ("4bit", True), ("8bit", False)])
)
def test_an_adapter_trains_on_it_and_leaves_the_base(bits: str, dora: bool, tmp_path: Path) -> None:
    model = quantized(bits)
    before = logits(model)
    adapted = attach(model, PeftSection(r=4, use_dora=dora))
    torch.testing.assert_close(logits(adapted), before, rtol=1e-3, atol=1e-3)
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(adapted)], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and {p.dtype for _, p in trainable_parameters(adapted)} == {torch.float32}
    with base_only(adapted):
        assert torch.equal(logits(adapted), before)
    save_adapter(adapted, tmp_path)
    torch.testing.assert_close(logits(load_adapter(quantized(bits), tmp_path)), logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", slow_but(["4bit"], ["4bit", "8bit"]))
def test_validating_first_changes_no_gradient(bits: str) -> None:
    gradients = []
    for validate in (False, True):
        torch.manual_seed(0)
        adapted = attach(quantized(bits), PeftSection(r=4))
        if validate:
            logits(adapted)
        adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in trainable_parameters(adapted) if "layers.0" in n and "lora_B" in n})
    assert all(grad.abs().sum() > 0 and torch.equal(grad, gradients[1][n]) for n, grad in gradients[0].items())


def test_what_bitsandbytes_cannot_do_here_is_refused(small_config: Config) -> None:
    pytest.importorskip("bitsandbytes")
    config = small_config(model={"quantization": "8bit", "device": "cpu"}, peft={"use_dora": True})
    with pytest.raises(ConfigurationError, match=r"model.quantization: 8bit with peft.use_dora needs CUDA"):
        TrainingWrapper(config).plan()


def test_a_packed_layer_cannot_train_whole() -> None:
    with pytest.raises(AdapterError, match=r"this model cannot take this adapter"):
        attach(quantized("4bit"), PeftSection(target_modules=["q_proj"], modules_to_save=["v_proj"]))


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_run_on_it_learns(small_config: Config, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    config = small_config(model={"quantization": bits}, training={"max_steps": 4, "gradient_checkpointing": True})
    summary = TrainingWrapper(config).train()
    assert summary.validation_loss is not None and summary.base_validation_loss is not None
    assert summary.validation_loss < summary.base_validation_loss


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"quantization": "4bit"}}, "model.quantization"),
        ({"training": {"optimizer": "adamw_8bit"}}, "training.optimizer"),
    ],
)
def test_without_the_package_planning_says_how_to_get_it(
    sections: dict[str, Any], key: str, small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python marks a package that cannot be imported
    with pytest.raises(ConfigurationError, match=rf"{key}: needs .*pip install 'training-lens\[quantization\]'"):
        TrainingWrapper(small_config(**sections)).plan()


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_base_that_was_saved_quantized_trains_as_it_is(bits: str, small_config: Config, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded.PATHS[embedded.MODEL], tmp_path / "model"))
    whole = quantized(bits)
    whole.save_pretrained(folder)
    section = {"id": str(folder), "device": "cpu"}
    assert torch.equal(logits(load_model(ModelSection.model_validate(section), CPU, "fp32")), logits(whole))
    summary = TrainingWrapper(small_config(model=section, training={"max_steps": 2})).train()
    assert summary.status == "finished" and summary.train_loss is not None
