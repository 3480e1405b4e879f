"""Every number of weights and spectra equals that of the dense matrices, for every variant and kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from training_lens.collectors import (
    AdapterSnapshotsCollector,
    AdapterWeightsCollector,
    BaseWeightsCollector,
    SpectraCollector,
)

SECTIONS: list[dict[str, Any]] = [
    {},
    {"variant": "rslora"},
    {"use_dora": True},
    {"init": "pissa"},
    {"family": "GPT2"},
    {"family": "GPT2", "use_dora": True},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 2.0}},
]
COLLECTORS = (AdapterWeightsCollector, BaseWeightsCollector, SpectraCollector, AdapterSnapshotsCollector)


def stepped(loop: Any, model: Any, ids: Tensor, dense: Any) -> tuple[Any, dict[str, Any], list[Tensor]]:
    """A loop after one step of AdamW, what was captured, and dW before it."""
    of = loop(model, [c() for c in COLLECTORS], torch.optim.AdamW(model.parameters(), lr=1e-2))
    before = [m.change.clone() for m in dense(of)]
    return of, of.step(ids), before


def close(found: Tensor, wanted: list[Tensor] | Tensor, rtol: float = 2e-5) -> None:
    wanted = torch.stack(list(wanted)) if isinstance(wanted, list) else wanted
    torch.testing.assert_close(found.double(), wanted.double(), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_weights_and_spectra_are_those_of_dense_matrices(
    section: dict[str, Any], adapted: Callable[..., Any], loop: Any, dense: Any, ids: Tensor
) -> None:
    of, found, before = stepped(loop, adapted(**section), ids, dense)
    modules, matrices = of.context.modules, dense(of)
    weights, spectra = found["adapter_weights"].scalars, found["spectra"].scalars
    a, b = [m.a.detach().double() for m in modules], [m.b.detach().double() for m in modules]
    close(weights["norm_a"], [x.norm() for x in a])
    close(weights["norm_b"], [x.norm() for x in b])
    close(weights["norm_update"], [m.change.norm() for m in matrices])
    close(weights["norm_step"], [(m.change - old).norm() for m, old in zip(matrices, before, strict=True)], 1e-4)
    close(weights["balance"], [(x @ x.T - y.T @ y).norm() for x, y in zip(a, b, strict=True)])
    close(spectra["top_ratio"], [_top(y) / _top(x) for x, y in zip(a, b, strict=True)])
    singular = [torch.linalg.svdvals(m.change) for m in matrices]
    for row, wanted in zip(found["spectra"].vectors["singular_values"], singular, strict=True):
        close(row, wanted[: len(row)])
        assert float(wanted[len(row) :].sum()) < 1e-9  # nothing of the spectrum is left out
    shares = [s / s.sum() for s in singular]
    close(spectra["effective_rank"], [torch.special.entr(p).sum().exp() for p in shares])
    close(spectra["stable_rank"], [(s / s[0]).square().sum() for s in singular])
    energies = [s.square().cumsum(0) / s.square().sum() for s in singular]
    close(spectra["energy_rank"], [(e < 0.9).sum() + 1 for e in energies])
    assert found["adapter_weights"].rows == found["spectra"].rows == [m.name for m in modules]


def _top(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x)[0]


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_frozen_weights_are_measured_once_before_training(
    section: dict[str, Any], adapted: Callable[..., Any], loop: Any, dense: Any
) -> None:
    of = loop(adapted(**section), [BaseWeightsCollector()])
    base = of.started["base_weights"].scalars
    weights = [m.base for m in dense(of)]
    close(base["norm"], [w.norm() for w in weights])
    tops = torch.stack([_top(w) for w in weights])
    assert bool((base["top"] <= tops * (1 + 1e-5)).all() and (base["top"] >= 0.99 * tops).all())
    assert of.look() == {}


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_a_snapshot_gives_the_whole_update(
    section: dict[str, Any], adapted: Callable[..., Any], loop: Any, dense: Any
) -> None:
    of = loop(adapted(**section), [AdapterSnapshotsCollector()])
    tensors = of.look()["adapters"].tensors
    for module, matrices in zip(of.context.modules, dense(of), strict=True):
        a, b = (tensors[f"{module.name}.{part}"].double() for part in "ab")
        close(module.record.scaling * (b @ a), matrices.change, 1e-6)
        assert (f"{module.name}.magnitude" in tensors) is bool(section.get("use_dora"))


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_doras_changes_are_those_of_rows_of_the_whole_weight(
    family: str, adapted: Callable[..., Any], loop: Any, dense: Any
) -> None:
    of = loop(adapted(family, use_dora=True), [SpectraCollector()])
    found = of.look()["spectra"].scalars
    for i, (module, matrices) in enumerate(zip(of.context.modules, dense(of), strict=True)):
        before, after = matrices.base, matrices.base + matrices.change
        lengths = before.norm(dim=1)
        close(found["magnitude_change"][i], (module.magnitude.detach().double() - lengths).abs().mean())
        close(found["direction_change"][i], (1 - torch.cosine_similarity(before, after)).mean(), 1e-4)


def test_only_dora_has_doras_measures(adapted: Callable[..., Any], loop: Any) -> None:
    assert "magnitude_change" not in loop(adapted(), [SpectraCollector()]).look()["spectra"].scalars


def test_a_fresh_adapter_changes_nothing(adapted: Callable[..., Any], loop: Any) -> None:
    found = loop(adapted(moved=False), [SpectraCollector(), AdapterWeightsCollector()]).look()
    assert not found["adapter_weights"].scalars["norm_update"].any() and not found["spectra"].scalars["top_ratio"].any()
    assert not torch.stack(list(found["spectra"].vectors["singular_values"])).any()


def test_without_the_weights_before_a_step_its_norm_is_unknown(adapted: Callable[..., Any], loop: Any) -> None:
    found = loop(adapted(), [AdapterWeightsCollector()]).look()["adapter_weights"].scalars
    assert found["norm_step"].isnan().all() and found["norm_update"].isfinite().all()


def test_steps_of_several_updates_are_those_of_dense_matrices(
    adapted: Callable[..., Any], loop: Any, dense: Any, ids: Tensor
) -> None:
    """Also where one is a millionth of the change."""
    model = adapted()
    of = loop(model, [AdapterWeightsCollector()], torch.optim.AdamW(model.parameters(), lr=1e-7, weight_decay=0.1))
    for _ in range(3):
        before = [m.change for m in dense(of)]
        found = of.step(ids)["adapter_weights"].scalars["norm_step"]
        close(found, [(m.change - old).norm() for m, old in zip(dense(of), before, strict=True)], 1e-4)


def test_nan_in_one_module_stays_there(adapted: Callable[..., Any], loop: Any) -> None:
    model = adapted(use_dora=True)
    of = loop(model, [AdapterWeightsCollector(), SpectraCollector()])
    of.context.modules[2].b.data[0, 0] = torch.nan
    of.context.before = [batch.copy_weights() for batch in of.context.batches]
    for captured in of.look().values():
        for measure, values in captured.scalars.items():
            broken = values.isnan().nonzero().flatten().tolist()
            assert broken == ([] if measure in ("norm_a", "magnitude_change") else [2]), measure
        for rows in captured.vectors.values():
            assert [i for i, row in enumerate(rows) if row.isnan().any()] == [2]


def test_a_quantized_weight_is_measured_as_it_computes(loop: Any) -> None:
    """4-bit: W is what the codes stand for, and stays what it is."""
    bnb = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    base = tiny_model(hidden_size=64, intermediate_size=64)
    layer = base.model.layers[0].self_attn
    quantized = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    quantized.load_state_dict(layer.q_proj.state_dict())
    layer.q_proj = quantized.to("cpu")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    of = loop(model, [BaseWeightsCollector()])
    columns = layer.q_proj.get_base_layer()(torch.eye(64)).T  # W e_i are its columns
    torch.testing.assert_close(of.started["base_weights"].scalars["norm"][0], columns.norm(), rtol=1e-4, atol=0)
    assert layer.q_proj.get_base_layer().weight.dtype == torch.uint8


def test_adapters_in_bfloat16_are_measured_in_float32(adapted: Callable[..., Any], loop: Any, dense: Any) -> None:
    of = loop(
        adapted().to(torch.bfloat16), [AdapterWeightsCollector(), AdapterSnapshotsCollector(), SpectraCollector()]
    )
    found = of.look()
    close(found["adapter_weights"].scalars["norm_update"], [m.change.norm() for m in dense(of)])
    assert {t.dtype for t in found["adapters"].tensors.values()} == {torch.bfloat16}
