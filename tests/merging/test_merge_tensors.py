"""Folded into plain weights an adapter computes what it did: of every kind, on every base, with any scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_cases import slow_but
from tiny_models import tiny_model

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import AdapterError
from training_lens.merging.merge_tensors import check_mergeable, merge_weights
from training_lens.models.adapter_scale import scaled_adapter
from training_lens.models.adapters import attach, base_only, load_adapter, save_adapter, trainable_parameters
from training_lens.models.factory import load_model

CPU = torch.device("cpu")
IDS = torch.arange(40, 72).view(2, 16)
KINDS: list[dict[str, Any]] = [
    {},
    {"variant": "rslora"},
    {"use_dora": True},
    {"init": "pissa"},
    {"init": "pissa", "use_dora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    {"modules_to_save": ["norm"], "use_dora": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},  # tied: both ends are trained as one
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
]
FEW = [KINDS[0], *KINDS[6:9]]


def base(quantization: Any = "none") -> Any:
    return load_model(ModelSection(quantization=quantization), CPU, "fp32")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def adapted(model: Any, **section: Any) -> Any:
    """The model under an adapter that was moved off its start."""
    torch.manual_seed(0)
    result = attach(model, PeftSection(r=4, **section))
    for _, parameter in trainable_parameters(result):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return result


@pytest.mark.parametrize("section", slow_but([KINDS[2], KINDS[5], KINDS[7], KINDS[8]], KINDS), ids=str)
def test_folded_computes_what_the_adapter_does(section: dict[str, Any]) -> None:
    model = adapted(base(), **section)
    wanted = logits(model)
    with base_only(model):
        assert (logits(model) - wanted).abs().max() > 0.5
    folded = merge_weights(model)
    assert (logits(folded.model) - wanted).abs().max() < 1e-4
    assert not [n for n, _ in folded.model.named_modules() if "lora" in n or "modules_to_save" in n]


def test_a_saved_adapter_folds_too(tmp_path: Path) -> None:
    model = adapted(base(), init="pissa")
    save_adapter(model, tmp_path)
    assert (logits(merge_weights(load_adapter(base(), tmp_path)).model) - logits(model)).abs().max() < 1e-4


def test_weights_the_other_way_round_fold() -> None:
    for dora in (False, True):
        model = adapted(tiny_model("GPT2"), use_dora=dora)
        wanted = logits(model)
        assert (logits(merge_weights(model).model) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    "section", slow_but([KINDS[6]], [*FEW, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}]), ids=str
)
def test_half_the_scale_is_half_the_update(section: dict[str, Any]) -> None:
    model = adapted(base(), **section)
    with scaled_adapter(model, 0.5):
        wanted = logits(model)
    half = merge_weights(model, 0.5)
    assert (logits(half.model) - wanted).abs().max() < 1e-4
    whole, before = merge_weights(adapted(base(), **section)), base()
    for name in half.changed:
        old = before.get_parameter(name)
        torch.testing.assert_close(
            half.model.get_parameter(name) - old, 0.5 * (whole.model.get_parameter(name) - old), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("section", slow_but([KINDS[6], KINDS[8]], FEW), ids=str)
def test_base_and_delta_are_the_merged_weights_and_nothing_else_changed(section: dict[str, Any]) -> None:
    whole, delta = merge_weights(adapted(base(), **section)), merge_weights(adapted(base(), **section), delta=True)
    assert whole.changed == delta.changed and whole.untied == delta.untied
    before, after = base().state_dict(), whole.model.state_dict()
    for name, weight in after.items():
        changed = name in whole.changed or (name == "lm_head.weight" and not whole.untied)
        if not changed:
            assert torch.equal(weight, before[name]), name
        elif name in delta.changed:
            torch.testing.assert_close(before[name] + delta.model.get_parameter(name), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_one_end_of_tied_weights_unties_them(end: str) -> None:
    model = adapted(base(), target_modules=[end])
    folded = merge_weights(model)
    embedding, head = (folded.model.get_parameter(n) for n in ("model.embed_tokens.weight", "lm_head.weight"))
    still, original = (head, "lm_head.weight") if end == "embed_tokens" else (embedding, "model.embed_tokens.weight")
    assert folded.untied and not folded.model.config.tie_word_embeddings
    assert torch.equal(still, base().get_parameter(original)) and not torch.equal(embedding, head)


def test_both_ends_trained_as_one_stay_one() -> None:
    folded = merge_weights(adapted(base(), target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    assert not folded.untied and folded.model.config.tie_word_embeddings
    assert folded.model.get_input_embeddings().weight is folded.model.get_output_embeddings().weight


@pytest.mark.parametrize(("bits", "dora"), [("4bit", False), ("4bit", True), ("8bit", False)])
def test_a_packed_base_folds_into_plain_weights(bits: str, dora: bool) -> None:
    pytest.importorskip("bitsandbytes")
    model = adapted(base(bits), use_dora=dora)
    wanted = logits(model)
    folded = merge_weights(model)
    assert {p.dtype for p in folded.model.parameters()} == {torch.float32}
    assert not hasattr(folded.model.config, "quantization_config")
    # 8 bits round what goes into a layer too: only the weights can be the same.
    limit = 1e-4 if bits == "4bit" else 0.5 * wanted.std(-1).mean()
    assert (logits(folded.model) - wanted).abs().max() < limit


def test_an_update_that_is_not_finite_is_refused() -> None:
    model = adapted(base(), target_modules=["q_proj"])
    next(p for n, p in trainable_parameters(model) if "lora_B" in n).data.fill_(math.inf)
    with pytest.raises(AdapterError, match=r"update of 'model.layers.0.self_attn.q_proj.weight' is not finite"):
        merge_weights(model)


def test_what_has_no_plain_weights_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    told = LoraConfig(target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True)
    model = get_peft_model(tiny_model("GPT2"), told)
    with pytest.raises(AdapterError, match=r"'transformer.h.0.attn.c_attn' carries a Linear on a Conv1D"):
        check_mergeable(model)
