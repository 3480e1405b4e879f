"""A fresh adapter is the base, exactly; names that match nothing are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import AdapterError
from training_lens.models.adapters import (
    attach,
    base_only,
    count_parameters,
    load_adapter,
    save_adapter,
    target_names,
    trainable,
)
from training_lens.models.factory import load_model

CPU = torch.device("cpu")
IDS = torch.arange(40, 72).view(2, 16)


def base() -> Any:
    return load_model(ModelSection(), CPU, "fp32")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_computes_what_the_base_does(dora: bool) -> None:
    model = base()
    before = logits(model)
    adapted = logits(attach(model, PeftSection(use_dora=dora, r=4)))
    if not dora:
        assert torch.equal(adapted, before)
    else:  # DoRA divides by norms that it also multiplies with: equal up to float32 rounding
        torch.testing.assert_close(adapted, before, rtol=1e-4, atol=1e-4)


def test_auto_adapts_every_linear_layer_but_the_head() -> None:
    model = base()
    assert target_names(model, "auto") == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    adapted = attach(model, PeftSection(target_modules=["q_proj"]))
    assert {n.split(".")[-4] for n, _ in trainable(adapted)} == {"q_proj"}


def test_a_target_that_matches_nothing_lists_close_names() -> None:
    with pytest.raises(
        AdapterError, match=r"no module is called 'q_porj'. Did you mean 'q_proj'.*Linear layers: down_proj"
    ):
        target_names(base(), ["q_porj"])


def test_adapters_are_float32_and_counted() -> None:
    adapted = attach(load_model(ModelSection(dtype="bf16"), CPU, "fp32"), PeftSection(r=4))
    assert {p.dtype for _, p in trainable(adapted)} == {torch.float32}
    count = count_parameters(adapted)
    assert count.trainable == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert 0 < count.share < 0.1


def test_an_adapter_saves_and_loads_the_same(tmp_path: Path) -> None:
    adapted = attach(base(), PeftSection(r=4))
    for _, parameter in trainable(adapted):
        torch.nn.init.normal_(parameter, std=0.05)
    wanted = logits(adapted)
    save_adapter(adapted, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = load_adapter(base(), tmp_path)
    assert torch.equal(logits(loaded), wanted)
    with base_only(loaded):
        assert torch.equal(logits(loaded), logits(base()))


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, shared: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config.json is missing"):
        load_adapter(base(), tmp_path)
    save_adapter(attach(base(), PeftSection(r=4)), tmp_path)
    other = load_model(ModelSection(id=str(shared / "models/tinystories-656k")), CPU, "fp32")
    with pytest.raises(AdapterError, match="does not fit this base model"):
        load_adapter(other, tmp_path)
