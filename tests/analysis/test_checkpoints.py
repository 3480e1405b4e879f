"""What is measured of saved adapters equals the dense matrices, decomposed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training_lens.analysis.open_recording import open_recording
from training_lens.core.recording import Recording
from training_lens.errors import LensError
from training_lens.merging.weight_update import PREFIX


def dense(folder: Path, module: str, scaling: float) -> Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    return scaling * (b @ a)


def value(recording: Recording, table: str, measure: str, module: str, at: int = -1) -> float:
    return float(recording.series(table, measure).column(module)[at])


def test_every_measure_equals_the_dense_one(trainer_output: Path, base_folder: Path) -> None:
    """alpha 8, q_proj's 16; rank 4, v_proj's 2; rsLoRA."""
    recording = open_recording(trainer_output)
    weights = load_file(base_folder / "model.safetensors")
    scalings = {"q": 16 / 2, "v": 8 / math.sqrt(2), "down": 8 / 2}
    assert {m.kind: m.scaling for m in recording.modules} == pytest.approx(scalings)
    for module in recording.modules:
        updates = [dense(trainer_output / f"checkpoint-{s}", module.name, scalings[module.kind]) for s in (2, 4, 6)]
        changes = [math.nan, *((b - a).norm().item() for a, b in pairwise(updates))]
        singular = torch.linalg.svdvals(updates[-1])[: module.rank]
        share = singular / singular.sum()
        expected = {
            ("adapter_weights", "norm_update"): updates[-1].norm(),
            ("spectra", "effective_rank"): (-share * share.log()).sum().exp(),
            ("spectra", "stable_rank"): singular.square().sum() / singular[0] ** 2,
            ("base_weights", "norm"): weights[f"{module.name}.weight"].norm(),
            ("base_weights", "top"): torch.linalg.matrix_norm(weights[f"{module.name}.weight"], 2),
        }
        for (table, measure), right in expected.items():
            assert value(recording, table, measure, module.name) == pytest.approx(float(right), rel=1e-4), measure
        steps = recording.series("adapter_weights", "norm_step").column(module.name)
        assert steps.tolist() == pytest.approx(changes, rel=1e-4, nan_ok=True)
        _, vectors = recording.captures.vectors("spectra", "singular_values")
        kept = vectors[module.name][-1]
        assert kept[~np.isnan(kept)].tolist() == pytest.approx(singular.tolist(), rel=1e-4)


def test_snapshots_are_the_saved_tensors(trainer_output: Path) -> None:
    recording = open_recording(trainer_output)
    saved = load_file(trainer_output / "checkpoint-4" / "adapter_model.safetensors")
    kept = recording.captures.snapshot("adapters", 4)
    assert len(kept) == len(saved)
    assert all(torch.equal(kept[f"{m.name}.a"], saved[f"{PREFIX}{m.name}.lora_A.weight"]) for m in recording.modules)
    with pytest.raises(LensError, match=r"no checkpoint of step 5 .* there are: 2, 4, 6"):
        recording.captures.snapshot("adapters", 5)


def test_an_unknown_table_names_the_nearest(trainer_output: Path) -> None:
    with pytest.raises(LensError, match=r"no table 'spectre'\. Did you mean 'spectra'"):
        open_recording(trainer_output).captures.table("spectre")


def test_measures_are_chosen(trainer_output: Path) -> None:
    recording = open_recording(trainer_output)
    assert recording.captures.table("spectra", ["stable_rank"]).column_names == ["step", "module", "stable_rank"]
    assert recording.has("spectra", "stable_rank") and not recording.has("spectra", "magnitude_change")
    with pytest.raises(LensError, match="Did you mean 'stable_rank'"):
        recording.captures.table("spectra", ["stable_rnk"])


def peft_folder(model: Any, folder: Path, **config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, **config))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(folder)
    return adapted


def test_dora_is_measured_against_its_base(llama: Any, base_folder: Path, tmp_path: Path) -> None:
    peft_folder(llama, tmp_path, target_modules=["q_proj"], use_dora=True)
    recording = open_recording(tmp_path, base=base_folder)
    weights, tensors = load_file(base_folder / "model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    for module in recording.modules:
        assert module.variant == "dora"
        before = weights[f"{module.name}.weight"].double()
        after = before + dense(tmp_path, module.name, 2.0)
        magnitude = tensors[f"{PREFIX}{module.name}.lora_magnitude_vector"].double()
        turned = 1 - torch.cosine_similarity(before, after, dim=1)
        moved = (magnitude - before.norm(dim=1)).abs()
        found = [value(recording, "spectra", f"{what}_change", module.name) for what in ("magnitude", "direction")]
        assert found == pytest.approx([moved.mean().item(), turned.mean().item()], rel=1e-3)
    assert open_recording(tmp_path).has("spectra", "stable_rank")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_weights_kept_the_other_way_round_and_embeddings_are_found(tmp_path: Path) -> None:
    """GPT-2 keeps (in, out), in files without the model's first name; an embedding's A reads tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from training_lens.analysis.saved_adapters import open_adapter, open_base_weights

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    state = {n.removeprefix("transformer."): p.detach().clone() for n, p in model.named_parameters()}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    model.config.save_pretrained(tmp_path / "base")
    targets = ["attn.c_proj", "c_fc", "wte"]
    peft_folder(model, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True)
    adapter = open_adapter(tmp_path / "adapter")
    weights = open_base_weights(adapter, tmp_path / "base")
    assert weights is not None and len(adapter.records) == 3
    for record in adapter.records:
        found = weights.read_weight(record)
        expected = state[f"{record.name.removeprefix('transformer.')}.weight"].T
        assert found is not None and torch.equal(found, expected)
        assert found.shape == (record.out_features, record.in_features)


def test_what_is_no_number_is_data(tmp_path: Path, save_adapter: Callable[..., Path]) -> None:
    good = (torch.randn(2, 6), torch.randn(5, 2))
    bad = (torch.full((2, 6), torch.nan), torch.randn(5, 2))
    save_adapter("out/checkpoint-1", {"layers.0.q_proj": good, "layers.1.q_proj": good})
    save_adapter("out/checkpoint-2", {"layers.0.q_proj": good, "layers.1.q_proj": bad})
    recording = open_recording(tmp_path / "out")
    for table, measure in (("adapter_weights", "norm_update"), ("spectra", "stable_rank"), ("spectra", "energy_rank")):
        values = recording.series(table, measure).values
        assert np.isfinite(values).tolist() == [[True, True], [True, False]], measure


def test_modules_come_layer_by_layer(save_adapter: Callable[..., Path]) -> None:
    pair = (torch.ones(2, 6), torch.ones(5, 2))
    folder = save_adapter("adapter", {f"layers.{i}.q_proj": pair for i in (10, 9, 0)})
    assert [module.layer for module in open_recording(folder).modules] == [0, 9, 10]
