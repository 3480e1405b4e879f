"""Adapted modules are found whatever their names, once each; a model without any is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from training_lens.config.schema import PeftSection
from training_lens.core.modules import ModuleBatches, adapter_modules, is_identity_adapter
from training_lens.errors import LensError
from training_lens.models.adapters import attach


def test_records_have_each_modules_layer_and_kind() -> None:
    modules = adapter_modules(attach(tiny_model(), PeftSection(r=3, lora_alpha=6.0)))
    assert len(modules) == 14
    record = modules[11].record
    assert (record.name, record.layer, record.kind) == ("model.layers.1.mlp.gate_proj", 1, "gate")
    assert (record.rank, record.in_features, record.out_features, record.scaling) == (3, 32, 48, 2.0)
    assert {m.record.kind for m in modules} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert {(m.record.variant, m.record.adapter) for m in modules} == {("lora", "default")}


@pytest.mark.parametrize(
    ("section", "variant", "parts"),
    [({"use_dora": True}, "dora", 3), ({"init": "pissa"}, "pissa", 2), ({"variant": "rslora"}, "lora", 2)],
)
def test_variants_are_recognized_by_their_parameters(section: dict[str, Any], variant: str, parts: int) -> None:
    modules = adapter_modules(attach(tiny_model(), PeftSection.model_validate({"r": 4, "lora_alpha": 8.0, **section})))
    assert {m.record.variant for m in modules} == {variant} and {m.record.rank for m in modules} == {4}
    assert {len(m.trained_parameters) for m in modules} == {parts} and all(
        p.requires_grad for p in modules[0].trained_parameters
    )
    assert modules[0].record.scaling == (4.0 if section.get("variant") == "rslora" else 2.0)


def test_pissas_factors_are_both_halves() -> None:
    module = adapter_modules(attach(tiny_model(), PeftSection(r=4, init="pissa")))[0]
    a, b = module.factors()
    assert a.shape == (8, 32) and b.shape == (32, 8)
    torch.testing.assert_close(b @ a, torch.zeros(32, 32), atol=1e-6, rtol=0)  # it starts as the base


def test_layers_of_another_family_are_numbered() -> None:
    modules = adapter_modules(attach(tiny_model("GPT2", n_layer=1), PeftSection(r=2)))
    assert [(m.record.layer, m.record.kind) for m in modules] == [
        (0, "c_attn"),
        (0, "c_proj"),
        (0, "c_fc"),
        (0, "c_proj"),
    ]


@pytest.mark.parametrize("name", ["c_attn", "c_fc"])
def test_the_frozen_weight_is_out_by_in_for_every_layer_type(name: str) -> None:
    model = tiny_model("GPT2", n_layer=1)
    layer = dict(model.named_modules())["transformer.h.0." + ("attn." if name == "c_attn" else "mlp.") + name]
    x = torch.randn(5, 32)
    wanted = layer(x) - layer.bias
    module = adapter_modules(attach(model, PeftSection(r=2, target_modules=[name])))[0]
    torch.testing.assert_close(x @ module.base_weight().T, wanted, rtol=1e-4, atol=1e-5)


def test_a_square_conv1d_weight_is_transposed_too() -> None:
    model = tiny_model("GPT2", n_layer=1)
    layer = model.transformer.h[0].attn.c_proj
    x = torch.randn(5, 32)
    wanted = layer(x) - layer.bias
    module = adapter_modules(attach(model, PeftSection(r=2, target_modules=["attn.c_proj"])))[0]
    torch.testing.assert_close(x @ module.base_weight().T, wanted, rtol=1e-4, atol=1e-5)


def test_an_embedding_is_a_map_from_tokens() -> None:
    module = adapter_modules(attach(tiny_model(), PeftSection(r=2, target_modules=["embed_tokens"])))[0]
    assert (module.record.in_features, module.record.out_features, module.record.layer) == (97, 32, None)
    weight = module.base_weight()
    assert weight is not None and weight.shape == (32, 97)


def test_of_several_adapters_the_training_ones_are_found() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    assert {m.record.rank for m in adapter_modules(model)} == {2}
    model.set_adapter("other")
    assert [m.name for m in adapter_modules(model)][:2] == [f"model.layers.0.self_attn.{kind}_proj" for kind in "qv"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    names = {m.name for m in adapter_modules(model)}
    assert len(names) == 6 and "model.layers.0.self_attn.q_proj#other" in names
    model.requires_grad_(False)  # nothing trains: all are there to be read
    assert {m.name for m in adapter_modules(model)} == names


def test_a_shared_layer_counts_once() -> None:
    base = tiny_model()
    base.model.layers[1].self_attn = base.model.layers[0].self_attn
    modules = adapter_modules(attach(base, PeftSection(r=2, target_modules=["q_proj"])))
    assert [m.name for m in modules] == ["model.layers.0.self_attn.q_proj"]


def test_a_shared_factor_counts_once() -> None:
    model = attach(tiny_model(), PeftSection(r=2, target_modules=["q_proj"]))
    first, second = (model.base_model.model.model.layers[i].self_attn.q_proj for i in range(2))
    second.lora_A["default"].weight = first.lora_A["default"].weight
    second.lora_B["default"].weight = first.lora_B["default"].weight
    assert len(adapter_modules(model)) == 1


def test_a_model_without_lora_is_an_error_with_the_reason() -> None:
    from peft import IA3Config, get_peft_model

    with pytest.raises(
        LensError, match=r"no LoRA module in this LlamaForCausalLM: nothing in it trains.*lens\.enabled"
    ):
        adapter_modules(tiny_model())
    with pytest.raises(LensError, match=r"trains 21 parameters of its own \(a full fine-tune\?\)"):
        adapter_modules(tiny_model().requires_grad_(True))
    ia3 = get_peft_model(tiny_model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(LensError, match=r"no LoRA module in this PeftModel.*LoRA and DoRA"):
        adapter_modules(ia3)


def test_batches_restore_the_models_order() -> None:
    model = attach(tiny_model(), PeftSection(r=3, rank_pattern={"k_proj": 2}, use_dora=True))
    modules = adapter_modules(model)
    groups = ModuleBatches(modules)
    assert sorted(i for group in groups for i in group.positions) == list(range(14))
    assert len(list(groups)) == 5  # q and o, k, v, gate and up, down
    norms = groups.restore_order([group.copy_weights().a.norm(dim=(1, 2)) for group in groups])
    torch.testing.assert_close(norms, torch.stack([m.a.detach().norm() for m in modules]))
    parts = [{"rank": torch.full((len(group.modules),), float(group.copy_weights().a.shape[1]))} for group in groups]
    parts[0]["more"] = torch.ones(len(next(iter(groups)).modules))
    joined = groups.restore_order_all(parts)
    assert joined["rank"].tolist() == [float(m.record.rank) for m in modules]
    has = [i for i, known in enumerate(joined["more"].isfinite().tolist()) if known]
    assert has == list(next(iter(groups)).positions)


def test_batches_are_float32_copies_with_zeros_for_missing_gradients() -> None:
    model = attach(tiny_model(), PeftSection(r=3, target_modules=["q_proj"], use_dora=True)).to(torch.bfloat16)
    modules = adapter_modules(model)
    (group,) = ModuleBatches(modules)
    weights = group.copy_weights()
    modules[0].a.data.zero_()
    modules[1].b.grad = torch.ones_like(modules[1].b)
    gradients = group.copy_gradients(lambda p: p.grad)
    assert weights.a.dtype == torch.float32 and weights.a[0].any() and weights.magnitude is not None
    assert not gradients.b[0].any() and gradients.b[1].all() and gradients.magnitude is not None


def test_full_factors_include_pissas_frozen_halves() -> None:
    modules = adapter_modules(attach(tiny_model(), PeftSection(r=3, init="pissa", target_modules=["q_proj"])))
    (group,) = ModuleBatches(modules)
    whole = group.full_factors(group.copy_weights())
    for i, module in enumerate(modules):
        a, b = module.factors()
        assert torch.equal(whole.a[i], a) and torch.equal(whole.b[i], b)


def test_wrappers_are_stripped_from_names() -> None:
    model = attach(tiny_model(), PeftSection(r=3))
    bare = [m.name for m in adapter_modules(model)]
    compiled = torch.compile(model, backend="eager")
    assert [m.name for m in adapter_modules(compiled)] == bare
    parallel = torch.nn.Module()
    parallel.module = compiled  # as DistributedDataParallel keeps it
    assert [m.name for m in adapter_modules(parallel)] == bare


@pytest.mark.parametrize(
    ("section", "nothing"),
    [
        ({}, True),
        ({"variant": "rslora"}, True),
        ({"target_modules": ["embed_tokens", "q_proj"]}, True),  # PEFT starts an embedding with A = 0
        ({"use_dora": True}, False),  # equal up to rounding only
        ({"init": "pissa"}, False),
    ],
    ids=str,
)
def test_a_fresh_adapter_is_the_identity_until_one_number_changes(section: dict[str, Any], nothing: bool) -> None:
    model = attach(tiny_model(), PeftSection.model_validate({"r": 3, **section}))
    assert is_identity_adapter(model) is nothing
    module = adapter_modules(model)[-1]
    module.a.data[0, 0] = module.b.data[0, 0] = 1e-30
    assert not is_identity_adapter(model)


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}], ids=str)
def test_only_lora_counts_as_an_identity_adapter(more: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    assert not is_identity_adapter(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], **more)))
    assert is_identity_adapter(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])))
