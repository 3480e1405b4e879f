"""An adapter for mlx-lm is the trained one as its LoRA layers apply it; what they cannot apply is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_variants import VARIANTS
from safetensors.torch import load_file

from training_lens.adapter_export.export_plan import ExportOptions
from training_lens.adapter_export.export_run import export_adapter
from training_lens.adapter_export.mlx_form import name_in_layer
from training_lens.errors import AdapterError
from training_lens.merging.weight_update import load_updates
from training_lens.utils.files import read_json


def test_factors_are_laid_out_as_mlx_multiplies_them(
    write_adapter: Callable[..., Path], export_config: Callable[..., Any], tmp_path: Path
) -> None:
    """mlx-lm adds scale (x a) b to the output of a module named in keys, in each of the last num_layers layers."""
    folder = write_adapter(**VARIANTS["rslora, patterns"])
    out = export_adapter(export_config(folder), ExportOptions("mlx", tmp_path / "out", scale=0.5)).output
    config, tensors = read_json(out / "adapter_config.json"), load_file(out / "adapters.safetensors")
    asked = config["lora_parameters"]
    assert config["num_layers"] == 2 and asked["rank"] == 4 and "self_attn.q_proj" in asked["keys"]
    for name, update in load_updates(folder).items():
        a, b = (tensors[name.replace(".weight", f".lora_{part}")] for part in "ab")
        assert a.shape[1] == b.shape[0] == 4
        x = torch.randn(3, len(a))
        change, _ = update.compute_change(torch.zeros(b.shape[1], len(a), dtype=torch.float64), slice(None))
        torch.testing.assert_close(asked["scale"] * (x @ a) @ b, (x.double() @ (0.5 * change).T).float())


def test_what_mlx_cannot_apply_is_refused(
    write_adapter: Callable[..., Path], export_config: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"adapted by DoRA"):
        export_adapter(export_config(write_adapter(use_dora=True)), ExportOptions("mlx", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_modules_are_named_within_their_layer() -> None:
    assert name_in_layer("model.layers.12.self_attn.q_proj") == "self_attn.q_proj"
    assert name_in_layer("lm_head") == "lm_head"
