"""A fused model has the loss and gradients that it has by itself, and what is not known stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from slow_cases import slow_but
from tiny_models import tiny_model
from torch import Tensor

from training_lens.config.schema import PeftSection
from training_lens.models.adapters import attach
from training_lens.models.fast.engine import Engine
from training_lens.models.fast.install import install_kernels, uninstall_kernels
from training_lens.models.token_scores import supervised_scores

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "exact gelu": ("Llama", {"hidden_act": "gelu"}),
    "relu": ("Llama", {"hidden_act": "relu"}),
    "gemma3": ("Gemma3Text", {"sliding_window": 4}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"sliding_window": 4}),
    "phi3, half turned": ("Phi3", {"partial_rotary_factor": 0.5}),
    "gemma2": ("Gemma2", {}),
    "cohere": ("Cohere", {}),
    "cohere, normed heads": ("Cohere", {"use_qk_norm": True}),
    "cohere2": ("Cohere2", {"sliding_window": 4, "sliding_window_pattern": 2}),
    "gpt2": ("GPT2", {}),
}
PADDED = ("gpt2",)
LENGTHS = (9, 2, 7)
CASES = {
    "lora": {},
    "rslora": {"variant": "rslora"},
    "pissa": {"init": "pissa"},
    "dora": {"use_dora": True},
    "some layers": {"target_modules": ["q_proj", "down_proj"]},
    "other ranks": {"rank_pattern": {"k_proj": 2}},
    "head, too": {"modules_to_save": ["lm_head"]},
}


def adapted(name: str = "llama", **peft: Any) -> Any:
    """A model of random weights with an adapter that changes what it computes."""
    kind, changes = KINDS[name]
    model = tiny_model(kind, **changes)
    for parameter in model.parameters():  # norms of 1 and biases of 0 would hide a fault
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = attach(model, PeftSection(r=4, **peft))
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def examples() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 97, (1, length), generator=generator) for length in LENGTHS]
    masks = [torch.rand(1, length, generator=generator) < 0.6 for length in LENGTHS]
    masks[0][0, -1] = True
    return ids, masks


def plain_loss(model: Any) -> Tensor:
    """Each example alone, before anything is fused."""
    return torch.stack([supervised_scores(model, i, m).nll.sum() for i, m in zip(*examples(), strict=True)]).sum()


def fused_loss(engine: Engine, in_line: bool) -> Tensor:
    ids, masks = examples()
    if in_line:
        return engine.loss_sum(torch.cat(ids, 1), torch.cat(masks, 1), LENGTHS)
    width = max(LENGTHS)
    padded = [torch.nn.functional.pad(i, (0, width - i.shape[1]), value=5) for i in ids]
    masked = [torch.nn.functional.pad(m, (0, width - m.shape[1])) for m in masks]
    return engine.loss_sum(torch.cat(padded), torch.cat(masked))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and found
    for name in wanted:
        most = 2e-5 * float(wanted[name].abs().max())
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=max(1e-6, most))


@pytest.mark.parametrize("name", slow_but(list(KINDS)[::2], KINDS))
def test_loss_and_gradients_are_those_of_each_example_alone(name: str) -> None:
    model = adapted(name)
    wanted = plain_loss(model)
    grads = gradients(model, wanted)
    engine = Engine(model)
    assert engine.can_pack == (name not in PADDED), engine.kernels
    for in_line in (False, True) if engine.can_pack else (False,):
        loss = fused_loss(engine, in_line)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        same(gradients(model, loss), grads)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_adapter_learns(case: str) -> None:
    model = adapted(**CASES[case])
    engine = Engine(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = fused_loss(engine, engine.can_pack)
        gradients(model, loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_adapter_trains_as_it_does_unfused(case: str) -> None:
    model = adapted(**CASES[case])
    wanted = plain_loss(model)
    grads = gradients(model, wanted)
    engine = Engine(model)
    loss = fused_loss(engine, engine.can_pack)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    same(gradients(model, loss), grads)


def test_gradient_checkpointing_changes_nothing() -> None:
    from training_lens.models.factory import checkpoint_gradients

    model = adapted()
    grads = gradients(model, plain_loss(model))
    checkpoint_gradients(model)
    same(gradients(model, fused_loss(Engine(model.train()), True)), grads)


def test_a_hook_on_a_projection_still_sees_what_it_gives() -> None:
    model = adapted()
    engine, seen = Engine(model), []
    wanted = fused_loss(engine, True)
    layers = model.base_model.model.model.layers[0]
    for projection in (layers.self_attn.k_proj, layers.mlp.up_proj):
        projection.register_forward_hook(lambda _module, _given, output: seen.append(output.shape))
    torch.testing.assert_close(fused_loss(engine, True), wanted)
    assert [shape[-1] for shape in seen] == [16, 48]


def test_the_adapter_can_be_switched_off_and_merged_and_taken_back() -> None:
    model = adapted()
    ids = examples()[0][0]
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        install_kernels(model)
        torch.testing.assert_close(model(input_ids=ids).logits, on, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, off, rtol=1e-4, atol=1e-5)
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids).logits, on, rtol=1e-3, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=ids).logits, on, rtol=1e-3, atol=1e-4)
    uninstall_kernels(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, on, rtol=1e-3, atol=1e-4)


def test_base_weights_stay_bit_for_bit() -> None:
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = Engine(model)
    fused_loss(engine, True).backward()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_two_adapters_at_once_are_left_to_peft() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    ids = examples()[0][0]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        install_kernels(model)
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_what_stays_as_it_is_is_told_with_its_reason() -> None:
    told = str(Engine(adapted("gpt2")).kernels)
    assert "attention of another structure" in told and "adapted layers" in told
    model = adapted("gemma2")
    for layer in model.base_model.model.model.layers:
        layer.self_attn.attention_dropout = 0.1
        layer.mlp.extra = torch.nn.Linear(2, 2)
    told = str(install_kernels(model))
    assert "9 norms; 2 as they are (attention with dropout)" in told
    assert "2 as they are (Gemma2MLP with more than a gated MLP)" in told
    assert "2 gated MLPs" in str(Engine(adapted("relu")).kernels)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    model = adapted()
    norm = model.base_model.model.model.norm
    norm.forward = norm.forward  # of its own, as other libraries put there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(norm), "forward", lambda self, x: self.weight * x)
        told = str(install_kernels(model))
    assert "1 as they are (LlamaRMSNorm has a forward of its own)" in told
    assert "4 as they are (LlamaRMSNorm computes something else)" in told


def test_dropout_falls_on_the_branch_alone() -> None:
    model = adapted(lora_dropout=0.9).train()
    ids = examples()[0][0]
    with torch.no_grad():
        install_kernels(model)
        one, other = model(input_ids=ids).logits, model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bf16_losses_stay_close_to_those_of_the_modules_themselves(name: str) -> None:
    model = adapted(name).to(torch.bfloat16)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = float(plain_loss(model).detach())
        found = float(fused_loss(Engine(model), True).detach())
    assert found == pytest.approx(wanted, rel=5e-3)


def test_get_peft_model_of_plain_peft_is_fused_as_well() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
    assert Engine(model).can_pack
