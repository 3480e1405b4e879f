"""Activations of adapted modules equal those of dense matrices, for every variant and kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from training_lens.collectors import LoRAActivationsCollector, LoRAActivationTracker
from training_lens.core.modules import adapter_modules
from training_lens.core.probe import Probe
from training_lens.models.adapters import base_only
from training_lens.models.quantization import keep_trainable

SECTIONS: list[dict[str, Any]] = [
    {},
    {"variant": "rslora"},
    {"use_dora": True},
    {"init": "pissa"},
    {"family": "GPT2"},
    {"family": "GPT2", "use_dora": True},
    {"target_modules": ["lm_head", "q_proj"]},
]
MEASURES = ("input_rms", "down_rms", "up_rms", "output_rms", "share")


def inputs_and_outputs(model: Any, probe: Probe) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each LoRA layer, by plain hooks, at real tokens, in float64."""
    from peft.tuners.lora import LoraLayer

    seen = {}

    def hook(name: str) -> Any:
        def see(_layer: Any, given: Any, output: Any) -> None:
            seen[name] = (given[0][probe.attention_mask].double(), output[probe.attention_mask].double())

        return see

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    with torch.no_grad():
        model.eval()(input_ids=probe.input_ids)
    for handle in handles:
        handle.remove()
    return {name.removeprefix("base_model.model."): found for name, found in seen.items()}


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_every_measure_is_that_of_dense_matrices(
    section: dict[str, Any], adapted: Callable[..., Any], loop: Any, dense: Any, probe: Probe
) -> None:
    model = adapted(**section)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # large ones, so that W x is not W x + bias
    of = loop(model, [LoRAActivationsCollector()], probe=probe)
    seen = inputs_and_outputs(model, probe)
    with LoRAActivationTracker(model, attention_mask=probe.attention_mask) as tracker, torch.no_grad():
        model(input_ids=probe.input_ids)
    for i, (module, matrices) in enumerate(zip(of.context.modules, dense(of), strict=True)):
        x, output = seen[module.name]
        a, _ = module.factors()
        up, frozen = x @ matrices.change.T, x @ matrices.base.T
        wanted = (rms(x), rms(x @ a.double().T), rms(up), rms(output), up.norm() / frozen.norm())
        for name, value in zip(MEASURES, wanted, strict=True):
            torch.testing.assert_close(tracker.measures()[name][i].double(), value, rtol=1e-4, atol=1e-7)
    captured = of.go_through_probe()["lora_activations"]
    inner = [i for i, name in enumerate(tracker.names) if name != "lm_head"]  # the probe's head sees targets alone
    for name in MEASURES:
        torch.testing.assert_close(captured.scalars[name][inner], tracker.measures()[name][inner], rtol=1e-4, atol=1e-7)
        assert captured.scalars[name].isfinite().all()
    assert captured.rows == tracker.names


def test_an_embedding_has_no_input_size(adapted: Callable[..., Any], loop: Any, dense: Any, probe: Probe) -> None:
    of = loop(adapted(target_modules=["embed_tokens", "q_proj"]), [LoRAActivationsCollector()], probe=probe)
    found = of.go_through_probe()["lora_activations"].scalars
    assert found["input_rms"].isnan().nonzero().flatten().tolist() == [0]
    ids, matrices = probe.input_ids[probe.attention_mask], dense(of)[0]
    torch.testing.assert_close(
        found["share"][0].double(), matrices.change.T[ids].norm() / matrices.base.T[ids].norm(), rtol=1e-4, atol=0
    )
    a, _ = of.context.modules[0].factors()
    torch.testing.assert_close(found["down_rms"][0].double(), rms(a.double().T[ids]), rtol=1e-4, atol=0)


def test_scaled_embeddings_and_dora_on_them_do_not_break_the_pass(probe: Probe) -> None:
    """Gemma scales what its embedding gives: the share is as without."""
    from peft import LoraConfig, get_peft_model

    for dora in (False, True):
        base = tiny_model("Gemma2", num_hidden_layers=1, tie_word_embeddings=False)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], use_dora=dora))
        for name, parameter in model.named_parameters():
            if "lora_embedding_B" in name or "lora_B" in name:
                torch.nn.init.normal_(parameter)
        with LoRAActivationTracker(model, attention_mask=probe.attention_mask) as tracker, torch.no_grad():
            model.eval()(input_ids=probe.input_ids)
        (module, _), ids = adapter_modules(model), probe.input_ids[probe.attention_mask]
        a, b = module.factors()
        wanted = (module.record.scaling * (b @ a).T[ids]).norm() / module.base_weight().T[ids].norm()
        torch.testing.assert_close(tracker.measures()["share"][0], wanted.detach(), rtol=1e-4, atol=0)


def test_several_passes_are_one_over_all_their_tokens(adapted: Callable[..., Any], ids: Tensor) -> None:
    model = adapted().eval()
    with LoRAActivationTracker(model) as apart, torch.no_grad():
        for row in ids:
            model(input_ids=row[None])
    with LoRAActivationTracker(model) as together, torch.no_grad():
        model(input_ids=ids)
    for name in MEASURES:
        torch.testing.assert_close(apart.measures()[name], together.measures()[name], rtol=1e-5, atol=1e-8)


def test_padding_is_left_out_by_the_attention_mask(adapted: Callable[..., Any], probe: Probe) -> None:
    model, mask = adapted().eval(), probe.attention_mask.long()
    with LoRAActivationTracker(model) as by_mask, torch.no_grad():
        model(input_ids=probe.input_ids, attention_mask=mask)
    with LoRAActivationTracker(model, attention_mask=probe.attention_mask) as told, torch.no_grad():
        model(input_ids=probe.input_ids)
    for name in MEASURES:
        torch.testing.assert_close(by_mask.measures()[name], told.measures()[name], rtol=1e-5, atol=1e-8)


def test_passes_without_the_adapter_do_not_count(adapted: Callable[..., Any], ids: Tensor) -> None:
    model = adapted().eval()
    with LoRAActivationTracker(model) as tracker, torch.no_grad(), base_only(model):
        model(input_ids=ids)
    assert all(values.isnan().all() for values in tracker.measures().values())


def test_an_inactive_adapter_is_not_measured(ids: Tensor) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    modules = [m for m in adapter_modules_of_both(model) if m.record.layer == 0]
    with LoRAActivationTracker(model, modules) as one, torch.no_grad():
        model.eval()(input_ids=ids)
    assert one.measures()["share"].isnan().tolist() == [False, True]
    model.base_model.set_adapter(["default", "other"])
    with LoRAActivationTracker(model, modules) as both, torch.no_grad():
        model.eval()(input_ids=ids)
    shares = both.measures()["share"]  # layer 0 has the same input: what one adds says nothing of the other
    torch.testing.assert_close(shares[0], one.measures()["share"][0])
    assert shares[1].isfinite()


def adapter_modules_of_both(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return adapter_modules(model)


def test_the_share_of_a_quantized_layer_uses_its_dequantized_weight(ids: Tensor) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    base = tiny_model(hidden_size=64, intermediate_size=64)
    attention = base.model.layers[0].self_attn
    quantized = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    quantized.load_state_dict(attention.q_proj.state_dict())
    attention.q_proj = keep_trainable(quantized).to("cpu")
    for dora in (False, True):
        config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora)
        model = get_peft_model(base, config)
        torch.nn.init.normal_(adapter_modules(model)[0].b)
        with LoRAActivationTracker(model) as tracker, torch.no_grad():
            model.eval()(input_ids=ids)
        module = adapter_modules(model)[0]
        assert tracker.measures()["share"].isfinite().all()
        x = base.model.layers[0].input_layernorm(base.model.embed_tokens(ids)).flatten(0, 1)
        a, b = module.factors()
        up, frozen = module.record.scaling * (x @ a.T @ b.T), x @ module.base_weight().T
        torch.testing.assert_close(
            tracker.measures()["share"][0], (up.norm() / frozen.norm()).detach(), rtol=1e-3, atol=1e-7
        )
        base = model.unload()


def test_nothing_is_left_on_the_model(adapted: Callable[..., Any], ids: Tensor) -> None:
    model = adapted()
    with LoRAActivationTracker(model):
        assert sum(len(m._forward_hooks) for m in model.modules()) == 14
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
