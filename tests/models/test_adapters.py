"""A fresh adapter is the base, exactly; without it the base is the base always; saved and loaded it is the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_cases import slow_but
from tiny_models import tiny_model

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import AdapterError
from training_lens.models.adapter_files import adopt_saved_settings
from training_lens.models.adapters import (
    attach,
    base_only,
    count_parameters,
    describe_adapter,
    load_adapter,
    restore_adapter,
    save_adapter,
    trainable_parameters,
)
from training_lens.models.factory import load_model
from training_lens.utils.devices import autocast

CPU = torch.device("cpu")
IDS = torch.arange(40, 72).view(2, 16)


def test_what_is_frozen_of_an_adapter_stays_frozen_when_it_was_switched_off() -> None:
    """PEFT switches it on again with all of it trainable."""
    model = attach(base(), PeftSection(r=2))
    for name, parameter in model.named_parameters():
        if "layers.1." in name:
            parameter.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with base_only(model):
        pass
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert any(before.values())


def base(dtype: Any = "auto") -> Any:
    """Its embedding and its head are one weight."""
    return load_model(ModelSection(dtype=dtype), CPU, "fp32")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def disturb(model: Any) -> None:
    """Move every trained parameter off its start."""
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.05 * torch.randn_like(parameter)


SECTIONS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"variant": "rslora"},
    {"variant": "rslora", "use_dora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["norm"], "use_dora": True},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
]
QUICK = [SECTIONS[0], SECTIONS[1], SECTIONS[4], SECTIONS[7]]


@pytest.mark.parametrize("section", slow_but(QUICK, SECTIONS), ids=str)
def test_a_fresh_adapter_computes_what_the_base_does(section: dict[str, Any]) -> None:
    model = base()
    before = logits(model)
    adapted = logits(attach(model, PeftSection(**section, r=4)))
    if not section.get("use_dora"):
        assert torch.equal(adapted, before)
    else:  # DoRA divides by norms that it also multiplies with: equal up to float32 rounding
        torch.testing.assert_close(adapted, before, rtol=1e-4, atol=1e-4)


def test_adapters_are_float32_and_counted() -> None:
    adapted = attach(load_model(ModelSection(dtype="bf16"), CPU, "fp32"), PeftSection(r=4))
    assert {p.dtype for _, p in trainable_parameters(adapted)} == {torch.float32}
    count = count_parameters(adapted)
    assert count.trainable == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert 0 < count.share < 0.1


@pytest.mark.parametrize("section", slow_but(QUICK, SECTIONS), ids=str)
def test_an_adapter_saves_and_loads_the_same(section: dict[str, Any], tmp_path: Path) -> None:
    adapted = attach(base(), PeftSection(**section, r=4))
    disturb(adapted)
    wanted = logits(adapted)
    save_adapter(adapted, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = load_adapter(base(), tmp_path)
    assert torch.equal(logits(loaded), wanted) and not torch.equal(wanted, logits(base()))
    for model in (loaded, adapted):
        with base_only(model):
            assert torch.equal(logits(model), logits(base()))
        assert torch.equal(logits(model), wanted)


def test_restoring_brings_back_every_trained_parameter(tmp_path: Path) -> None:
    section = PeftSection(r=4, use_dora=True, modules_to_save=["lm_head"])
    adapted, other = attach(base(), section), attach(base(), section)
    disturb(adapted)
    save_adapter(adapted, tmp_path)
    restore_adapter(other, tmp_path)
    one, two = dict(trainable_parameters(adapted)), dict(trainable_parameters(other))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(AdapterError, match="does not fit the run's adapter"):
        restore_adapter(attach(base(), PeftSection(r=8, modules_to_save=["norm"])), tmp_path)


@pytest.mark.parametrize(("variant", "scale"), [("lora", 32 / 16), ("rslora", 32 / 4)])
def test_the_variant_is_the_scale_of_the_update(variant: Any, scale: float) -> None:
    adapted = attach(base(), PeftSection(variant=variant, r=16, lora_alpha=32, target_modules=["q_proj"]))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(3, 192)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * x @ a.T @ b.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", slow_but(["lm_head"], ["lm_head", "embed_tokens"]))
def test_tied_weights_that_train_whole_stay_tied(name: str, tmp_path: Path) -> None:
    before = logits(base())
    adapted = attach(base(), PeftSection(r=4, modules_to_save=[name]))
    assert torch.equal(logits(adapted), before)
    whole = [p for n, p in trainable_parameters(adapted) if "modules_to_save" in n]
    assert len(whole) == 1 and whole[0].dtype == torch.float32
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    disturb(adapted)
    wanted = logits(adapted)
    embedding, head = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    assert embedding.weight is head.weight and not torch.equal(wanted, before)
    with base_only(adapted):
        assert torch.equal(logits(adapted), before)
    save_adapter(adapted, tmp_path)
    again = attach(base(), adopt_saved_settings(PeftSection(from_adapter=str(tmp_path))))
    for model in (load_adapter(base(), tmp_path), again):
        assert torch.equal(logits(model), wanted)
        with base_only(model):
            assert torch.equal(logits(model), before)


def test_gpt2s_tied_embedding_trains_whole() -> None:
    adapted = attach(tiny_model("GPT2"), PeftSection(r=4, modules_to_save=["wte"]))
    assert adapted.get_input_embeddings().weight is adapted.get_output_embeddings().weight
    assert [n for n, _ in trainable_parameters(adapted) if "lora_" not in n]


def test_a_tied_embedding_takes_a_lora_of_its_own() -> None:
    before = logits(base())
    adapted = attach(base(), PeftSection(r=4, target_modules=["embed_tokens"]))
    disturb(adapted)
    assert not torch.equal(logits(adapted), before)
    with base_only(adapted):
        assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("precision", slow_but(["bf16"], ["fp32", "bf16"]))
@pytest.mark.parametrize("name", slow_but(["lm_head"], ["lm_head", "embed_tokens", "norm"]))
def test_whole_modules_train_in_float32_on_a_half_precision_base(precision: Any, name: str) -> None:
    adapted = attach(base("bf16"), PeftSection(r=4, modules_to_save=[name]))
    assert {p.dtype for _, p in trainable_parameters(adapted)} == {torch.float32}
    with autocast(CPU, precision):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in trainable_parameters(adapted))


def test_what_is_trained_is_described() -> None:
    assert describe_adapter(PeftSection()) == "lora, r=16"
    described = describe_adapter(PeftSection(variant="rslora", use_dora=True, init="pissa", modules_to_save=["norm"]))
    assert described == "rslora+dora, pissa start, r=16, norm whole"
    assert (
        describe_adapter(PeftSection(lora_plus_ratio=8, from_adapter="a"))
        == "lora, r=16, B at 8 x lr, continuing from a"
    )


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config.json is missing"):
        load_adapter(base(), tmp_path)
    save_adapter(attach(base(), PeftSection(r=4)), tmp_path)
    with pytest.raises(AdapterError, match="does not fit this base model"):
        load_adapter(tiny_model(), tmp_path)


def configured(**values: Any) -> Callable[[Path], object]:
    """Sets keys of a saved adapter's configuration."""

    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def with_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], object]:
    """Saves other tensors instead."""

    def write(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return write


def shortened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors.items() if "layers.0" not in k}


def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {k.replace("layers.0", "layers.9"): v.clone() for k, v in tensors.items() if "layers.0" in k}


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut weights": (lambda f: os.truncate(f / "adapter_model.safetensors", 50_000), "safetensors is broken"),
    "empty config": (lambda f: (f / "adapter_config.json").write_text("{}"), "json names no peft_type"),
    "a list for config": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no JSON object"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), "is no valid JSON"),
    "unknown type": (configured(peft_type="NOPE"), "does not fit this base model: KeyError: 'NOPE'"),
    "rank of wrong type": (configured(r="abc"), "r: given 'abc'"),
    "other rank": (configured(r=8), "does not fit this base model: .*size mismatch"),
    "alpha of wrong type": (configured(lora_alpha="x"), "lora_alpha: given 'x'"),
    "a number for a target": (configured(target_modules=["q_proj", 3]), "target_modules: given 3"),
    "tensors left out": (with_tensors(shortened), "missing adapter keys"),
    "no tensors": (with_tensors(lambda _: {}), "missing adapter keys"),
    "more layers": (with_tensors(doubled), "which takes 70 of its 84 tensors"),
    "DoRA without magnitudes": (configured(use_dora=True), "missing adapter keys"),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(list(WRONG)[::2], WRONG))
def test_what_is_wrong_with_a_saved_adapter_is_said(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    save_adapter(attach(base(), PeftSection(r=4)), tmp_path)
    change(tmp_path)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(base(), tmp_path)
    assert str(tmp_path) in str(caught.value)
