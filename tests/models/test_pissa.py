"""PiSSA equals the base at its start and PiSSA's mathematics after it, on a base that stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slow_cases import mark_slow
from tiny_models import tiny_model

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.models import pissa
from training_lens.models.adapters import (
    attach,
    base_only,
    load_adapter,
    restore_adapter,
    save_adapter,
    trainable_parameters,
)
from training_lens.models.factory import load_model

IDS = torch.arange(40, 72).view(2, 16)


def base(dtype: Any = "auto") -> Any:
    return load_model(ModelSection(dtype=dtype), torch.device("cpu"), "fp32")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def loss_of(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
    return result


def trained(model: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=1e-3, weight_decay=0.1)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith(".frozen")}


@pytest.mark.parametrize(("variant", "dora"), [("lora", True), ("rslora", False)])
def test_a_fresh_start_computes_what_the_base_does(dora: bool, variant: Any) -> None:
    model = base()
    before = logits(model)
    adapted = attach(model, PeftSection(init="pissa", use_dora=dora, variant=variant, r=4))
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-4)
    assert all(parameter.abs().sum() > 0 for _, parameter in trainable_parameters(adapted))


def test_fused_weights_the_other_way_round_start_as_the_base() -> None:
    before, adapted = logits(tiny_model("GPT2")), attach(tiny_model("GPT2"), PeftSection(init="pissa", r=4))
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-4)


def test_without_the_adapter_is_exactly_the_base() -> None:
    model = base()
    before = logits(model)
    adapted = trained(attach(model, PeftSection(init="pissa", r=4)))
    assert not torch.equal(logits(adapted), before)
    with base_only(adapted):
        assert torch.equal(logits(adapted), before)


def test_the_frozen_halves_stay_bit_for_bit() -> None:
    adapted = attach(base(), PeftSection(init="pissa", r=4))
    before = frozen(adapted)
    trained(adapted)
    assert before and all(torch.equal(value, before[name]) for name, value in frozen(adapted).items())


@pytest.mark.parametrize(
    "section",
    [
        {},
        mark_slow({"variant": "rslora"}),
        mark_slow({"use_dora": True}),
        mark_slow({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}}),
    ],
)
def test_saved_is_a_plain_lora_of_twice_the_rank(section: dict[str, Any], tmp_path: Path) -> None:
    adapted = trained(attach(base(), PeftSection(init="pissa", r=4, **section)))
    save_adapter(adapted, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not [name for name in saved if "parametrizations" in name or "frozen" in name]
    assert {t.shape[0] for n, t in saved.items() if n.endswith("k_proj.lora_A.weight")} == {8}
    torch.testing.assert_close(logits(load_adapter(base(), tmp_path)), logits(adapted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_equals_the_adapter(dora: bool) -> None:
    adapted = trained(attach(base(), PeftSection(init="pissa", use_dora=dora, r=4)))
    wanted = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload(safe_merge=True)), wanted, rtol=1e-3, atol=1e-3)


def test_restoring_brings_back_both_halves(tmp_path: Path) -> None:
    section = PeftSection(init="pissa", r=4)
    torch.manual_seed(1)
    adapted = trained(attach(base(), section))
    save_adapter(adapted, tmp_path)
    torch.manual_seed(2)  # another random subspace at its start
    other = attach(base(), section)
    restore_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(adapted))
    for part in (frozen, lambda model: dict(trainable_parameters(model))):
        one, two = part(adapted), part(other)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("variant", ["lora", mark_slow("rslora")])
def test_the_first_gradient_is_that_of_pissa_on_the_changed_base(variant: Any) -> None:
    from peft import LoraConfig, get_peft_model

    section = PeftSection(init="pissa", r=4, variant=variant, target_modules=["q_proj", "down_proj"])
    ours = attach(base(), section)
    halves = {n.removesuffix(".parametrizations.weight.original"): p for n, p in trainable_parameters(ours)}
    theirs = get_peft_model(
        base(),
        LoraConfig(
            r=4,
            lora_alpha=section.lora_alpha,
            use_rslora=variant == "rslora",
            target_modules=["q_proj", "down_proj"],
            init_lora_weights="pissa_niter_16",
        ),
    )
    for layer in (m for m in theirs.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")):
        scale, a, b = layer.scaling["default"], layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.base_layer.weight.data += scale * b.data @ a.data
    same = {n.removesuffix(".weight"): p for n, p in trainable_parameters(theirs)}
    assert same.keys() == halves.keys()
    for name, parameter in same.items():
        parameter.data.copy_(halves[name].data)
    for layer in (m for m in theirs.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")):
        scale, a, b = layer.scaling["default"], layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.base_layer.weight.data -= scale * b.data @ a.data
    loss, wanted = loss_of(ours), loss_of(theirs)
    loss.backward(), wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for name, parameter in same.items():
        assert halves[name].grad is not None and parameter.grad is not None
        assert (halves[name].grad - parameter.grad).norm() < 1e-4 * parameter.grad.norm()


def test_the_halves_are_the_best_approximation_of_their_rank() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    a, b = pissa.principal_halves(weight, 6, scale=2.0)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(2.0 * b @ a, u[:, :6] * s[:6] @ v[:6], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_a_half_precision_base_starts_in_float32() -> None:
    model = base("bf16")
    before = logits(model).float()
    adapted = attach(model, PeftSection(init="pissa", r=4))
    assert {p.dtype for _, p in trainable_parameters(adapted)} == {torch.float32}
    torch.testing.assert_close(logits(adapted).float(), before, rtol=0.05, atol=0.1)
