"""Experts that a layer keeps in one parameter are adapted one by one, or are said to stay frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from slow_cases import slow_but
from tiny_models import tiny_model
from torch.nn.functional import cross_entropy

from training_lens.config.schema import PeftSection
from training_lens.core.modules import adapter_modules
from training_lens.errors import AdapterError
from training_lens.merging.merge_tensors import merge_weights
from training_lens.merging.weight_update import ExpertUpdate, load_updates
from training_lens.models.adapter_files import adopt_saved_settings
from training_lens.models.adapter_scale import scaled_adapter
from training_lens.models.adapters import attach, base_only, check_adapter, save_adapter, trainable_parameters
from training_lens.models.experts import count_routed, watch_routing
from training_lens.models.module_multipliers import MixedRowsError, ModuleMultipliers

IDS = torch.arange(3, 43).view(2, 20)
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "hidden_size": 48},  # square experts
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
ONE = {"peft.lora_dropout": {"lora_dropout": 0.1}, "peft.use_dora": {"use_dora": True}, "peft.init": {"init": "pissa"}}


def adapted(kind: str = "Mixtral", **section: Any) -> Any:
    """A tiny mixture with an adapter whose every factor is random."""
    model = attach(tiny_model(kind, **KINDS[kind]), PeftSection(**{"r": 4, **section})).eval()
    for name, parameter in trainable_parameters(model):
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.requires_grad_(False)


def test_experts_stay_frozen_with_a_line_that_says_their_share() -> None:
    for section in ({"target_parameters": "none"}, {"target_modules": ["q_proj"]}):
        found = check_adapter(tiny_model("Mixtral"), PeftSection(r=4, **section))
        assert not any("experts" in path for path in found.adapted)
        assert any("experts stay frozen, 74% of the model's parameters" in str(omission) for omission in found.left_out)


def test_the_rank_of_experts_is_that_of_a_token_over_its_experts() -> None:
    def ranks(**section: Any) -> set[int]:
        modules = adapter_modules(adapted(**section))
        return {m.record.rank for m in modules if m.expert is not None}

    assert ranks() == {2} and ranks(r=1) == {1} and ranks(expert_rank=3) == {3}
    assert ranks(rank_pattern={"gate_up_proj": 6}) == {6, 2}
    assert check_adapter(tiny_model("Mixtral"), PeftSection(r=4)).expert_rank == 2


def test_names_and_expressions_take_the_parameters_that_they_match() -> None:
    for wanted in (["experts.down_proj"], r".*layers\.\d\.mlp\.experts\.down_proj"):
        found = check_adapter(tiny_model("Mixtral"), PeftSection(r=4, target_parameters=wanted))
        assert "experts.down_proj" in found.names and "experts.gate_up_proj" not in found.names
    one = check_adapter(tiny_model("Mixtral"), PeftSection(r=4, target_parameters=r".*layers\.1.*down_proj"))
    assert [path for path in one.adapted if "experts" in path] == ["model.layers.1.mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        *((section, rf"{key}.*peft.target_parameters=none") for key, section in ONE.items()),
        ({"target_parameters": ["down_porj"]}, r"no parameter of experts is called 'down_porj'.*experts.down_proj"),
        ({"expert_rank": 33}, r"rank 33 is more than an expert of .* can have, whose matrix is 96 x 32"),
        ({"expert_rank": 2, "target_parameters": "none"}, "peft.expert_rank: no experts"),
    ],
)
def test_what_experts_cannot_have_is_refused_with_the_way_out(section: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        check_adapter(tiny_model("Mixtral"), PeftSection(**{"r": 4, **section}))


@pytest.mark.parametrize("kind", slow_but(["Mixtral", "GptOss"], KINDS))
@torch.no_grad()
def test_the_file_says_the_update_of_each_expert_that_peft_computes(kind: str, tmp_path: Path) -> None:
    """In float64, from the file alone; the layout of gpt-oss, square and transposed, does not show in its shapes."""
    model, base = adapted(kind), tiny_model(kind, **KINDS[kind])
    save_adapter(model, tmp_path)
    wanted, folded = model(IDS).logits, merge_weights(model).model
    assert (folded(IDS).logits - wanted).abs().max() < 1e-4 < (base(IDS).logits - wanted).abs().max()
    updates = {name: update for name, update in load_updates(tmp_path).items() if isinstance(update, ExpertUpdate)}
    assert len(updates) == 4
    for name, update in updates.items():
        change, _ = update.compute_change(torch.zeros(update.experts, 0, 0), slice(None))
        change = change.mT if kind == "GptOss" else change
        found = folded.get_parameter(name).double() - base.get_parameter(name).double()
        assert (found - change).abs().max() < 1e-6 < change.abs().max()


@torch.no_grad()
def test_experts_are_scaled_and_multiplied_as_all_modules_are() -> None:
    model = adapted()
    whole = model(IDS).logits
    with base_only(model):
        base = model(IDS).logits
    with scaled_adapter(model, 0.0):
        assert torch.equal(model(IDS).logits, base)
    multipliers = ModuleMultipliers(model)
    assert {name for name in multipliers.names if "experts" in name} == {
        f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("down_proj", "gate_up_proj")
    }
    for value, wanted in ((0.0, base), (1.0, whole)):
        with multipliers.apply_values([value] * len(multipliers.names)):
            assert torch.equal(model(IDS).logits, wanted)
    assert torch.equal(model(IDS).logits, whole)


def test_the_derivative_by_an_expert_multiplier_is_that_of_the_loss() -> None:
    model = adapted().double()
    model.get_base_model().set_experts_implementation("eager")  # the faster ones have no float64
    multipliers, lengths = ModuleMultipliers(model), [20]
    mask = torch.ones(1, 20, dtype=torch.bool)
    with pytest.raises(MixedRowsError, match="experts"):
        multipliers.compute_gradients(IDS, mask.expand(2, -1), [20, 20], 0.5)
    found, _ = multipliers.compute_gradients(IDS[:1], mask, lengths, 0.5)
    place = multipliers.names.index("model.layers.0.mlp.experts.down_proj")

    def loss(value: float) -> float:
        values = [0.5] * len(multipliers.names)
        values[place] = value
        with multipliers.apply_values(values), torch.no_grad():
            return float(cross_entropy(model(IDS[:1]).logits[0, :-1], IDS[0, 1:], reduction="sum"))

    slope = (loss(0.51) - loss(0.49)) / 0.02  # the norms and the router compute in float32
    assert found[0, place].item() == pytest.approx(slope, rel=1e-3)


def test_a_saved_adapter_of_experts_goes_on_with_its_own_targets(tmp_path: Path) -> None:
    save_adapter(adapted(target_parameters=["experts.down_proj"], expert_rank=3), tmp_path)
    section = adopt_saved_settings(PeftSection(from_adapter=str(tmp_path)))
    assert section.target_parameters == ["experts.down_proj"] and section.expert_rank == 4  # others follow a pattern
    model = attach(tiny_model("Mixtral"), section)
    ranks = {m.record.rank for m in adapter_modules(model) if m.expert is not None}
    assert ranks == {3}


def test_routing_counts_every_token_as_often_as_it_has_experts() -> None:
    counts: dict[str, torch.Tensor] = {}
    with watch_routing(adapted(), lambda path, routing, _: counts.__setitem__(path, count_routed(routing))):
        pass
    assert not counts
    model = adapted()
    with watch_routing(model, lambda path, routing, _: counts.__setitem__(path, count_routed(routing))):
        model(IDS)
    assert set(counts) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    assert all(count.sum() == 2 * IDS.numel() for count in counts.values())
