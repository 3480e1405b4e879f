"""Folded updates are the trained ones, whatever scales and patterns made them; what is no B A is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_variants import VARIANTS, adapt
from tiny_models import tiny_model

from training_lens.adapter_export.folded_lora import FoldedModule, fold_updates, pad_to_one_rank, short_target_names
from training_lens.adapter_export.update_checks import check_updates
from training_lens.config.schema import PeftSection
from training_lens.errors import AdapterError
from training_lens.merging.weight_update import LowRankUpdate, load_updates
from training_lens.models.adapters import attach, save_adapter


def as_updates(modules: Sequence[FoldedModule]) -> dict[str, LowRankUpdate]:
    return {f"{module.path}.weight": LowRankUpdate(module.a, module.b, 1.0, None) for module in modules}


@pytest.mark.parametrize(("kind", "variant"), [("GPT2", "rslora"), *(("Llama", name) for name in VARIANTS)])
def test_folded_and_padded_updates_are_the_trained_ones(kind: str, variant: str, tmp_path: Path) -> None:
    adapted = adapt(tiny_model(kind), **VARIANTS[variant])
    save_adapter(adapted, tmp_path)
    modules = pad_to_one_rank(fold_updates(adapted, 0.7, "a plain LoRA"))
    assert len({module.rank for module in modules}) == 1
    checks = check_updates(load_updates(tmp_path), 0.7, as_updates(modules))
    assert all(check.is_ok for check in checks), checks
    for module in modules:
        layer = adapted.get_base_model().get_submodule(module.path)
        with torch.no_grad():
            update = layer.get_delta_weight("default")
        folded = module.b @ module.a  # of a Conv1D and an embedding, the weight's transpose
        shaped = folded if isinstance(layer.get_base_layer(), torch.nn.Linear) else folded.T
        torch.testing.assert_close(shaped, 0.7 * update, rtol=1e-4, atol=1e-6)


def test_a_module_with_alpha_zero_is_exported_without_effect() -> None:
    adapted = adapt(tiny_model(), r=2, lora_alpha=4)
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    layer.scaling["default"] = 0.0
    folded = {module.path: module for module in fold_updates(adapted, 1.0, "a plain LoRA")}
    assert not folded["model.layers.0.mlp.up_proj"].b.any() and folded["model.layers.1.mlp.up_proj"].b.all()


def test_one_roundoff_more_than_rounding_makes_is_seen(tmp_path: Path) -> None:
    adapted = adapt(tiny_model(), **VARIANTS["rslora, patterns"])
    save_adapter(adapted, tmp_path)
    trained, (first, *others) = load_updates(tmp_path), fold_updates(adapted, 1.0, "a plain LoRA")
    for changed in (replace(first, b=first.b * (1 + 4e-7)), replace(first, a=first.a.roll(1, 0))):
        worst, _ = check_updates(trained, 1.0, as_updates([changed, *others]))
        assert worst.measured > 1 and worst.where == f"{first.path}.weight"
    _, lost = check_updates(trained, 1.0, as_updates(others))
    assert lost.measured == 1 and lost.where == f"{first.path}.weight"


@pytest.mark.parametrize(
    ("peft", "said"),
    [
        ({"use_dora": True}, "adapted by DoRA, .* full rank: no plain LoRA computes it. Merge it"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head' was trained whole .* Merge it"),
    ],
)
def test_what_is_no_low_rank_update_is_refused(peft: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        fold_updates(adapt(tiny_model(), **peft), 1.0, "a plain LoRA")


def test_experts_in_one_parameter_are_refused() -> None:
    adapted = attach(tiny_model("Mixtral"), PeftSection(r=4))
    with pytest.raises(
        AdapterError, match=r"experts.down_proj' adapts a layer's experts, which share one parameter.* Merge it"
    ):
        fold_updates(adapted, 1.0, "a plain LoRA")


def test_targets_are_named_by_their_last_part_unless_that_matches_another_module() -> None:
    every = ["a.0.up", "a.0.down", "a.1.up", "a.1.down"]
    assert short_target_names(["a.0.up", "a.1.up"], every) == ["up"]
    assert short_target_names(["a.0.up", "a.0.down", "a.1.down"], every) == ["a.0.up", "down"]
