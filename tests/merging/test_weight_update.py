"""A saved adapter's update is what its formula says, computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from training_lens.merging.weight_update import PREFIX, LowRankUpdate, WholeUpdate, load_updates

EVERY = slice(None)
WEIGHT = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0], [2.0]])  # rank 1


def test_lora_adds_s_b_a() -> None:
    change, noise = LowRankUpdate(A, B, 0.5, None).compute_change(WEIGHT, EVERY)
    assert change.tolist() == [[0, 0], [1, 2]] and noise.max() < 1e-5 and noise[0].tolist() == [0, 0]


def test_dora_stretches_each_row_to_its_magnitude() -> None:
    change, _ = LowRankUpdate(A, B, 0.5, torch.tensor([6.0, math.sqrt(10)])).compute_change(WEIGHT, EVERY)
    assert (WEIGHT + change).tolist() == [[6, 0], pytest.approx([1, 3], rel=1e-6)]


def test_rows_are_those_of_the_whole() -> None:
    for update in (LowRankUpdate(A, B, 0.5, torch.ones(2)), WholeUpdate(torch.arange(4.0).view(2, 2))):
        whole, part = update.compute_change(WEIGHT, EVERY), update.compute_change(WEIGHT[1:], slice(1, 2))
        assert all(torch.equal(w[1:], p) for w, p in zip(whole, part, strict=True))


@pytest.mark.parametrize(("rslora", "factor"), [(False, 2.0), (True, 4.0)])
def test_the_factor_is_that_of_rank_and_alpha_as_saved(tmp_path: Path, rslora: bool, factor: float) -> None:
    settings: dict[str, Any] = {"lora_alpha": 8, "use_rslora": rslora, "alpha_pattern": {"k_proj": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    a, b = torch.ones(4, 3), torch.ones(5, 4)
    tensors = {f"{m}.lora_{x}.weight": t.clone() for m in ("q_proj", "k_proj") for x, t in (("A", a), ("B", b))}
    tensors |= {"embed.base_layer.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)}
    tensors |= {"embed.lora_embedding_A": torch.ones(4, 7), "embed.lora_embedding_B": torch.ones(3, 4)}
    save_file({PREFIX + name: t for name, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    updates = load_updates(tmp_path)
    found = {name: u.factor for name, u in updates.items() if isinstance(u, LowRankUpdate)}
    assert found == {"q_proj.weight": factor, "k_proj.weight": factor / 2, "embed.weight": factor}
    assert isinstance(updates.pop("norm.weight"), WholeUpdate) and updates.keys() == found.keys()
