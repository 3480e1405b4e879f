"""Multipliers of modules: the ends to the bit, the path in weights between, and gradients by finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from slow_cases import slow_but
from tiny_models import tiny_model

from training_lens.config.schema import PeftSection
from training_lens.errors import AdapterError
from training_lens.measures.integrated_gradients import completeness_residual, gauss_legendre, integrate_gradients
from training_lens.models.adapter_scale import scaled_adapter
from training_lens.models.adapters import attach, base_only, trainable_parameters
from training_lens.models.module_multipliers import MixedRowsError, ModuleMultipliers
from training_lens.models.token_scores import supervised_scores

LENGTHS = (9, 12, 7)
IDS = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(12) >= 3) & (torch.arange(12) < torch.tensor(LENGTHS)[:, None])
LINEAR: list[dict[str, Any]] = [
    {},
    {"variant": "rslora"},
    {"init": "pissa"},
    {"use_dora": True},
    {"init": "pissa", "use_dora": True},
    {"target_modules": ["wte", "lm_head", "c_attn"]},
    {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},  # tied: both ends are trained as one
    {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "ln_1"]},
]


def adapted(section: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    """A tiny GPT-2, which computes wholly in its dtype, with an adapter that was moved off its start."""
    tied = bool(section.get("modules_to_save") == ["lm_head"])
    model = attach(
        tiny_model("GPT2", tie_word_embeddings=tied, initializer_range=0.1), PeftSection(r=2, lora_alpha=2, **section)
    )
    torch.manual_seed(0)
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.03 * torch.randn_like(parameter)
    return model.to(dtype).requires_grad_(False).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def row_losses(model: Any) -> torch.Tensor:
    """(rows,), the summed loss of each."""
    rows = MASK[:, 1:].nonzero(as_tuple=True)[0]
    with torch.inference_mode():
        nll = supervised_scores(model, IDS, MASK, LENGTHS).nll
    return torch.zeros(len(IDS), dtype=nll.dtype).index_add_(0, rows, nll)


@pytest.mark.parametrize("section", [*LINEAR, {"target_modules": ["c_attn"], "modules_to_save": ["mlp"]}], ids=str)
def test_the_ends_are_the_base_and_the_adapter_to_the_bit(section: dict[str, Any]) -> None:
    model = adapted(section, dtype=torch.float32)
    multipliers, trained = ModuleMultipliers(model), logits(model)
    with base_only(model):
        base = logits(model)
    with multipliers.apply_values([0.0] * len(multipliers.names)):
        assert torch.equal(logits(model), base)
    with multipliers.apply_values([1.0] * len(multipliers.names)):
        assert torch.equal(logits(model), trained)
    assert torch.equal(logits(model), trained) and not torch.equal(base, trained)


@pytest.mark.parametrize("section", LINEAR, ids=str)
def test_one_multiplier_for_all_is_the_adapter_at_this_scale(section: dict[str, Any]) -> None:
    model = adapted(section)
    multipliers = ModuleMultipliers(model)
    with scaled_adapter(model, 0.6):
        expected = logits(model)
    with multipliers.apply_values([0.6] * len(multipliers.names)):
        assert (logits(model) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("section", LINEAR, ids=str)
@pytest.mark.parametrize("alpha", slow_but([1.0], [0.3, 1.0]))
def test_gradients_are_finite_differences_of_each_row(section: dict[str, Any], alpha: float) -> None:
    """In float64; with DoRA by the path in weights, of which PEFT's own gradient, with its norm detached, is not."""
    model = adapted(section)
    multipliers, step = ModuleMultipliers(model), 1e-5
    found, nll = multipliers.compute_gradients(IDS, MASK, LENGTHS, alpha)
    assert found.shape == (3, len(multipliers.names)) and found.dtype == torch.float64
    for i in range(0, len(multipliers.names), 3):
        ends = []
        for sign in (-1, 1):
            values = [alpha] * len(multipliers.names)
            values[i] += sign * step
            with multipliers.apply_values(values):
                ends.append(row_losses(model))
        assert (found[:, i] - (ends[1] - ends[0]) / (2 * step)).abs().max() < 1e-6 * (1 + found.abs().max())
    with multipliers.apply_values([alpha] * len(multipliers.names)):
        assert float(nll.sum()) == pytest.approx(float(row_losses(model).sum()), rel=1e-12)


def test_at_1_the_integrand_is_the_inner_product_of_the_factor_and_its_gradient() -> None:
    model = adapted({"target_modules": ["c_attn", "c_fc", "lm_head"]})
    multipliers = ModuleMultipliers(model)
    found, _ = multipliers.compute_gradients(IDS, MASK, LENGTHS, 1.0)
    factors = [layer.lora_B["default"].weight.requires_grad_() for layer in multipliers.layers]
    logits_of_targets = model(input_ids=IDS).logits[:, :-1][MASK[:, 1:]]
    torch.nn.functional.cross_entropy(logits_of_targets, IDS[:, 1:][MASK[:, 1:]], reduction="sum").backward()
    expected = torch.stack([(factor.grad * factor).sum() for factor in factors])
    assert torch.allclose(found.sum(0), expected, rtol=1e-9)


def test_gradients_are_linear_in_rows() -> None:
    multipliers = ModuleMultipliers(adapted({"use_dora": True}))
    together, _ = multipliers.compute_gradients(IDS, MASK, LENGTHS, 0.5)
    for row, length in enumerate(LENGTHS):
        part = slice(row, row + 1)
        alone, _ = multipliers.compute_gradients(IDS[part, :length], MASK[part, :length], (length,), 0.5)
        assert torch.allclose(together[part], alone, rtol=1e-9, atol=1e-12)


def share(model: Any, points: int) -> tuple[np.ndarray, float, ModuleMultipliers]:
    """Shares of the modules summed over rows, the residual, and the multipliers."""
    multipliers = ModuleMultipliers(model)
    nodes, weights = gauss_legendre(points)
    gradients = (multipliers.compute_gradients(IDS, MASK, LENGTHS, float(at))[0].sum(0).numpy() for at in nodes)
    shares = integrate_gradients(gradients, weights)
    with base_only(model):
        base = row_losses(model)
    return shares, completeness_residual(shares, float((row_losses(model) - base).sum())), multipliers


@pytest.mark.parametrize("section", LINEAR, ids=str)
def test_shares_sum_to_the_change_of_the_loss(section: dict[str, Any]) -> None:
    assert share(adapted(section), 16)[1] < 1e-5


def test_one_module_that_is_not_zero_has_it_all_and_zeros_have_none() -> None:
    model = adapted({})
    layers = ModuleMultipliers(model).layers
    for layer in layers[1:]:
        layer.lora_B["default"].weight.zero_()
    shares, residual, _ = share(model, 16)
    assert residual < 1e-5 and shares[0] != 0 and not shares[1:].any()
    layers[0].lora_B["default"].weight.zero_()
    shares, residual, _ = share(model, 8)
    assert residual == 0 and not shares.any()


def test_dora_of_magnitude_0_is_the_weight_0_and_shared_out_as_well() -> None:
    model = adapted({"use_dora": True})
    for layer in ModuleMultipliers(model).layers[:3]:
        layer.lora_magnitude_vector["default"].weight.zero_()
    shares, residual, _ = share(model, 32)
    assert np.isfinite(shares).all() and residual < 1e-2


class FlattenedMlp(torch.nn.Module):
    """An MLP that gets the tokens of all rows in one list, as experts do."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.mlp(x.flatten(0, 1)).view_as(x)
        return result


def test_a_module_that_mixes_rows_is_named_and_takes_one_row_at_a_time() -> None:
    base = tiny_model()
    base.model.layers[0].mlp = FlattenedMlp(base.model.layers[0].mlp)
    model = attach(base, PeftSection(r=2, target_modules=["up_proj"])).double()
    multipliers = ModuleMultipliers(model)
    with pytest.raises(MixedRowsError, match=r"layers\.0\.mlp\.mlp\.up_proj"):
        multipliers.compute_gradients(IDS, MASK, LENGTHS, 0.5)
    assert multipliers.compute_gradients(IDS[:1], MASK[:1], LENGTHS[:1], 0.5)[0].shape == (1, 2)


def test_an_adapter_without_adapted_modules_is_refused() -> None:
    from peft import PromptTuningConfig, get_peft_model

    prompt = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(AdapterError, match="carries no adapter of its modules"):
        ModuleMultipliers(prompt)
