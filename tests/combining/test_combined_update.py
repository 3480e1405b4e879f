"""The combination of a module's updates: against PEFT's own, against sums in float64, and against a planted fault."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from training_lens.combining.combine_recipe import Recipe, build_recipe
from training_lens.combining.combined_checks import check_combination
from training_lens.combining.combined_update import CombinedModule, WeightedUpdate, combine_updates
from training_lens.errors import ConfigurationError
from training_lens.merging.weight_update import LowRankUpdate

INPUTS, OUTPUTS = 24, 16
EVERY = ("cat", "linear", "svd", "ties", "dare")


def random_update(seed: int, rank: int = 4, factor: float = 0.7, weight: float = 1.0) -> WeightedUpdate:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, INPUTS, generator=draw), torch.randn(OUTPUTS, rank, generator=draw)
    return WeightedUpdate(LowRankUpdate(a, b, factor, None), weight)


def written(module: CombinedModule) -> LowRankUpdate:
    return LowRankUpdate(module.a, module.b, 1.0, None)


def product(module: CombinedModule) -> torch.Tensor:
    return module.b.double() @ module.a.double()


def test_cat_is_the_weighted_sum_of_the_updates_whatever_their_ranks() -> None:
    updates = [
        random_update(0, rank=4, weight=0.3),
        random_update(1, rank=7, factor=2.5),
        random_update(2, weight=-1.1),
    ]
    found = combine_updates(updates, build_recipe("cat", 3), "q_proj")
    wanted = torch.stack([one.weight * one.compute_matrix() for one in updates]).sum(0)
    assert found.rank == 15 and found.energy_kept == 1 and found.from_sum < 1e-6 * found.sum_norm
    assert (product(found) - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_svd_is_the_best_approximation_of_that_sum() -> None:
    updates = [random_update(0, rank=4), random_update(1, rank=6, weight=0.5)]
    found = combine_updates(updates, build_recipe("svd", 2, rank=3), "q_proj")
    whole = torch.stack([one.weight * one.compute_matrix() for one in updates]).sum(0)
    singular = torch.linalg.svdvals(whole)
    assert found.rank == 3
    assert found.energy_kept == pytest.approx(float(singular[:3].square().sum() / singular.square().sum()))
    assert float((product(found) - whole).norm()) == pytest.approx(float(singular[3:].norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("how", "name", "density"),
    [("cat", "cat", None), ("linear", "linear", None), ("svd", "svd", None), ("ties", "ties_svd", 0.4)],
)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.8, -0.3)])
def test_plain_loras_are_combined_as_peft_combines_them(
    how: Any, name: str, density: float | None, weights: tuple[float, float]
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), config, "one")
    model.add_adapter("two", config)
    model.add_weighted_adapter(["one", "two"], list(weights), "both", name, density=density)
    recipe = build_recipe(how, 2, weights, density)
    layers = [(p, m) for p, m in model.named_modules() if hasattr(m, "lora_A") and "both" in m.lora_A]
    assert len(layers) == 4
    for path, layer in layers:
        updates = [
            WeightedUpdate(
                LowRankUpdate(layer.lora_A[n].weight.data, layer.lora_B[n].weight.data, layer.scaling[n], None), weight
            )
            for n, weight in zip(("one", "two"), weights, strict=True)
        ]
        wanted = layer.get_delta_weight("both").double()
        assert (product(combine_updates(updates, recipe, path)) - wanted).norm() < 1e-5 * wanted.norm()


def test_the_scale_of_rslora_is_kept_where_peft_multiplies_it_once_more() -> None:
    """PEFT's combined adapter inherits use_rslora, so its alpha = r scales the whole sum by sqrt(r)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=True, init_lora_weights=False)
    model = get_peft_model(tiny_model(), config, "one")
    model.add_adapter("two", config)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", "cat")
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and "both" in m.lora_A)
    updates = [
        WeightedUpdate(LowRankUpdate(layer.lora_A[n].weight.data, layer.lora_B[n].weight.data, 3.0, None), 1.0)
        for n in ("one", "two")
    ]
    assert layer.scaling["one"] == 3
    wanted = (layer.get_delta_weight("one") + layer.get_delta_weight("two")).double()
    assert (product(combine_updates(updates, build_recipe("cat", 2), "q")) - wanted).norm() < 1e-5 * wanted.norm()
    assert (layer.get_delta_weight("both").double() - 8**0.5 * wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_every_method_passes_its_check_and_a_changed_number_does_not(how: Any, density: float) -> None:
    recipe = build_recipe(how, 2, (1.0, 0.6), density if how in ("ties", "dare") else None)
    updates = {"q_proj.weight": [random_update(0), random_update(1, weight=0.6)]}
    found = combine_updates(updates["q_proj.weight"], recipe, "q_proj")
    checks = check_combination(updates, recipe, {"q_proj.weight": written(found)})
    assert all(check.is_ok for check in checks), checks
    spoilt = written(replace(found, b=found.b + 0.01 * (torch.arange(found.b.numel()) == 3).view(found.b.shape)))
    assert not check_combination(updates, recipe, {"q_proj.weight": spoilt})[0].is_ok
    assert [check.is_ok for check in check_combination(updates, recipe, {})] == [False, False]


def test_dare_draws_by_its_seed_and_the_module() -> None:
    updates = [random_update(0), random_update(1)]
    recipe = build_recipe("dare", 2, seed=7)
    first = combine_updates(updates, recipe, "q_proj")
    torch.manual_seed(123)  # of others: it changes nothing here, and is not changed
    state = torch.random.get_rng_state()
    assert torch.equal(combine_updates(updates, recipe, "q_proj").a, first.a)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(combine_updates(updates, recipe, "k_proj").a, first.a)
    assert not torch.equal(combine_updates(updates, replace(recipe, seed=8), "q_proj").a, first.a)


def test_a_recipe_has_defaults_and_names_all_that_is_wrong_at_once() -> None:
    assert build_recipe("cat", 2) == Recipe("cat", (0.5, 0.5)) and build_recipe("ties", 2).weights == (1.0, 1.0)
    assert build_recipe("dare", 4) == Recipe("dare", (0.25,) * 4, 0.5, None, 0)
    with pytest.raises(ConfigurationError) as caught:
        build_recipe("linear", 2, (1.0, 0.0, 2.0), 1.5, -3, -1)
    assert len(caught.value.problems) == 8


def test_another_subspace_than_the_best_is_found_out() -> None:
    """The second and third singular directions are as stationary as the first two, and are no best approximation."""
    updates = {"q_proj.weight": [random_update(0), random_update(1)]}
    recipe = build_recipe("svd", 2, rank=2)
    u, singular, vh = torch.linalg.svd(sum(one.weight * one.compute_matrix() for one in updates["q_proj.weight"]))
    for places, is_best in (([0, 1], True), ([1, 2], False)):
        module = LowRankUpdate(vh[places].float(), (u[:, places] * singular[places]).float(), 1.0, None)
        assert check_combination(updates, recipe, {"q_proj.weight": module})[0].is_ok == is_best
