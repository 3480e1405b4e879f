"""One adapter in depth: the same whether it is saved or in a model, and as the dense matrices have it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from training_lens.analysis import LoRAParameterAnalyzer
from training_lens.errors import AdapterError, LensError


def adapted(model: Any, **config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], **config))
    torch.manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_and_its_saved_adapter_say_the_same(llama: Any, base_folder: Path, tmp_path: Path, dora: bool) -> None:
    model = adapted(llama, use_dora=dora)
    model.save_pretrained(tmp_path)
    live, saved = LoRAParameterAnalyzer(model).table(), LoRAParameterAnalyzer(tmp_path, base_folder).table()
    assert len(live) == 4 and ("direction_change" in live[0]) == dora
    by_name = {row["module"]: row for row in saved}
    for row in live:
        there = by_name[row["module"]]
        assert row.keys() == there.keys()
        for column, value in row.items():
            assert there[column] == (pytest.approx(value, rel=1e-5, abs=1e-7) if not isinstance(value, str) else value)


def test_each_number_is_that_of_the_dense_matrices(llama: Any, base_folder: Path, tmp_path: Path) -> None:
    adapted(llama).save_pretrained(tmp_path)
    weights, tensors = load_file(base_folder / "model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    for row in LoRAParameterAnalyzer(tmp_path, base_folder).table():
        name = f"base_model.model.{row['module']}.lora_"
        a, b = (tensors[f"{name}{x}.weight"].double() for x in "AB")
        update, weight = 2 * b @ a, weights[f"{row['module']}.weight"].double()
        u, singular, vh = torch.linalg.svd(update)
        k = int(row["energy_rank"])
        energy = singular.square().cumsum(0) / singular.square().sum()
        assert k == int((energy < 0.9).sum()) + 1
        met = (u[:, :k].T @ weight @ vh[:k].T).norm()
        old, new = (torch.linalg.svd(w) for w in (weight, weight + update))
        count = (new.U[:, :10].T @ old.U[:, : min(weight.shape)]).abs().amax(1) < 0.5
        share = (count * new.S[:10] ** 2).sum() / (new.S[:10] ** 2).sum()
        expected = {
            "norm_update": update.norm(),
            "strength": update.norm() / weight.norm(),
            "top_strength": singular[0] / old.S[0],
            "amplification": update.norm() / met,
            "intruders": count.sum(),
            "intruder_energy_share": share,
            "top_ratio": torch.linalg.matrix_norm(b, 2) / torch.linalg.matrix_norm(a, 2),
            "balance": (a @ a.T - b.T @ b).norm(),
        }
        assert {c: row[c] for c in expected} == pytest.approx({c: float(v) for c, v in expected.items()}, rel=1e-3)
        assert row["singular_values"] == pytest.approx(singular[:4].tolist(), rel=1e-4)


def test_without_its_base_an_adapter_speaks_for_itself(save_adapter: Callable[..., Path]) -> None:
    folder = save_adapter("adapter", {"layers.0.q_proj": (torch.full((2, 6), torch.nan), torch.ones(5, 2))})
    (row,) = LoRAParameterAnalyzer(str(folder)).table()
    assert "strength" not in row and row["norm_update"] is None and row["norm_b"] == pytest.approx(10**0.5)
    json.dumps(row, allow_nan=False)


def test_what_has_no_lora_is_refused(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(LensError, match="found no LoRA module"):
        LoRAParameterAnalyzer(llama)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match="not an adapter folder"):
        LoRAParameterAnalyzer(tmp_path)
