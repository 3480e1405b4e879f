"""A scaled adapter is W + s (W' - W) in weights: the base at 0, itself at 1, and of the same kind between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from slow_cases import slow_but
from tiny_models import tiny_model

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import AdapterError
from training_lens.merging.merge_tensors import merge_weights
from training_lens.models.adapter_scale import scale_adapter, scaled_adapter
from training_lens.models.adapters import attach, base_only, load_adapter, save_adapter, trainable_parameters
from training_lens.models.factory import load_model

CPU = torch.device("cpu")
IDS = torch.arange(40, 72).view(2, 16)
EXACT: list[dict[str, Any]] = [
    {},
    {"variant": "rslora"},
    {"init": "pissa"},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},  # tied: both ends are trained as one
    {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
]
ROUNDED: list[dict[str, Any]] = [
    {"use_dora": True},
    {"init": "pissa", "use_dora": True},
    {"modules_to_save": ["norm"], "use_dora": True},
]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def adapted(section: dict[str, Any], model: Any = None) -> Any:
    """An adapter that was moved off its start."""
    torch.manual_seed(0)
    result = attach(model or load_model(ModelSection(), CPU, "fp32"), PeftSection(r=4, **section))
    for _, parameter in trainable_parameters(result):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return result


@pytest.mark.parametrize("section", slow_but([EXACT[0], EXACT[2], EXACT[4]], EXACT), ids=str)
def test_scale_0_is_the_base_exactly_and_1_changes_no_bit(section: dict[str, Any]) -> None:
    model = adapted(section)
    trained = logits(model)
    with base_only(model):
        base = logits(model)
    with scaled_adapter(model, 0.0):
        assert torch.equal(logits(model), base)
    with scaled_adapter(model, 1.0):
        assert torch.equal(logits(model), trained)
    assert torch.equal(logits(model), trained) and not torch.equal(base, trained)


@pytest.mark.parametrize("section", slow_but(ROUNDED[:1], ROUNDED), ids=str)
def test_dora_at_scale_0_is_the_base_up_to_rounding(section: dict[str, Any]) -> None:
    model = adapted(section)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with base_only(model):
        base = logits(model)
    with scaled_adapter(model, 0.0):
        assert (logits(model) - base).abs().max() < 1e-4
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("scale", slow_but([1.5], [0.4, 1.5]))
@pytest.mark.parametrize("section", slow_but([EXACT[0], EXACT[2], ROUNDED[0]], [*EXACT, *ROUNDED]), ids=str)
def test_each_weight_goes_so_far_from_the_base_towards_the_adapted_one(section: dict[str, Any], scale: float) -> None:
    base = load_model(ModelSection(), CPU, "fp32")
    whole = merge_weights(adapted(section))
    model = adapted(section)
    scale_adapter(model, scale)
    found = merge_weights(model)
    for name in whole.changed:
        old = base.get_parameter(name)
        wanted = old + scale * (whole.model.get_parameter(name) - old)
        torch.testing.assert_close(found.model.get_parameter(name), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_weights_the_other_way_round_scale_too(dora: bool) -> None:
    model, twin = (adapted({"use_dora": dora}, tiny_model("GPT2")) for _ in range(2))
    scale_adapter(model, 0.5)
    assert (logits(model) - logits(merge_weights(twin, 0.5).model)).abs().max() < 1e-4


@pytest.mark.parametrize("section", slow_but([{"init": "pissa"}], [{}, {"use_dora": True}, {"init": "pissa"}]), ids=str)
def test_a_scaled_adapter_is_saved_and_loaded_as_any_other(section: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(section)
    scale_adapter(model, 0.7)
    save_adapter(model, tmp_path)
    loaded = load_adapter(load_model(ModelSection(), CPU, "fp32"), tmp_path)
    assert (logits(loaded) - logits(model)).abs().max() < 1e-4


def test_an_adapter_of_another_kind_is_refused() -> None:
    from peft import IA3Config, get_peft_model

    model = get_peft_model(tiny_model("Llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="whose update cannot be scaled"):
        scale_adapter(model, 0.5)
