"""Plain models out of an adapted one: the base is the base, merged computes what the adapter does, nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow_cases import slow_but
from tiny_models import tiny_model

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import AdapterError
from training_lens.models.adapters import attach, base_only, trainable_parameters
from training_lens.models.copies import copy_base, copy_merged
from training_lens.models.factory import load_model

IDS = torch.arange(40, 72).view(2, 16)
KINDS: list[dict[str, Any]] = [
    {},
    {"variant": "rslora", "use_dora": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"]},  # the embedding, tied to the head, is not adapted
]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def adapted(**section: Any) -> Any:
    torch.manual_seed(0)
    model = attach(load_model(ModelSection(), torch.device("cpu"), "fp32"), PeftSection(r=4, **section))
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def state(model: Any) -> dict[str, tuple[torch.Tensor, bool]]:
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("section", KINDS, ids=str)
def test_the_base_is_the_base_and_merged_the_adapter(section: dict[str, Any]) -> None:
    model = adapted(**section)
    with base_only(model):
        base = logits(model)
    assert torch.equal(logits(copy_base(model)), base)
    torch.testing.assert_close(logits(copy_merged(model)), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(model) - base).abs().max() > 0.1


@pytest.mark.parametrize("section", slow_but(KINDS[:1], KINDS), ids=str)
def test_the_adapted_model_stays_as_it_is(section: dict[str, Any]) -> None:
    model = adapted(**section)
    before, wanted = state(model), logits(model)
    logits(copy_base(model))
    logits(copy_merged(model))
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n][0], after[n][0]) and before[n][1] == after[n][1] for n in before)
    assert torch.equal(logits(model), wanted)


def test_copies_share_what_they_do_not_change() -> None:
    model = attach(tiny_model("GPT2"), PeftSection(r=4, target_modules=["c_attn"]))
    own = {t.data_ptr() for t in model.parameters()}
    assert {t.data_ptr() for t in copy_base(model).parameters()} <= own
    merged = copy_merged(model)
    new = [name for name, t in merged.named_parameters() if t.data_ptr() not in own]
    assert new and all(".c_attn." in name for name in new)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_a_quantized_base_is_not_merged() -> None:
    pytest.importorskip("bitsandbytes")
    base = load_model(ModelSection(quantization="4bit"), torch.device("cpu"), "fp32")
    model = attach(base, PeftSection(r=4))
    with pytest.raises(AdapterError, match="quantized"):
        copy_merged(model)
    assert torch.isfinite(logits(copy_base(model))).all()
