"""adapter_config.json says what an adapter is, and nothing that an older PEFT would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.models.adapters import attach, load_adapter, save_adapter
from training_lens.models.factory import load_model
from training_lens.utils.files import read_json

# The fields of LoraConfig in PEFT 0.13.
KNOWN = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"),
    *("target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_config", "megatron_core", "loftq_config", "use_dora", "layer_replication"),
}
DEFAULTS = {"bias", "use_dora", "use_rslora", "rank_pattern", "lora_dropout", "modules_to_save", "loftq_config"}


@pytest.mark.parametrize(
    ("section", "kept"),
    [
        ({"r": 8, "lora_alpha": 8}, {"r": 8, "lora_alpha": 8}),  # PEFT's defaults, and yet what an adapter is named by
        ({"r": 4, "lora_dropout": 0.1}, {"r": 4, "lora_dropout": 0.1}),
        ({"r": 4, "use_dora": True, "variant": "rslora"}, {"use_dora": True, "use_rslora": True}),
        ({"r": 4, "rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2}}),
        ({"r": 4, "modules_to_save": ["norm"]}, {"modules_to_save": ["model.norm"]}),
    ],
    ids=str,
)
def test_only_what_differs_from_the_defaults_is_written(
    tmp_path: Path, section: dict[str, Any], kept: dict[str, Any]
) -> None:
    cpu = torch.device("cpu")
    model = attach(load_model(ModelSection(), cpu, "fp32"), PeftSection(**section))
    save_adapter(model, tmp_path)
    settings = read_json(tmp_path / "adapter_config.json")
    assert (
        settings.keys() <= KNOWN and settings.items() >= {"peft_type": "LORA", "task_type": "CAUSAL_LM", **kept}.items()
    )
    assert {"target_modules", "base_model_name_or_path"} <= settings.keys()
    assert not DEFAULTS & (settings.keys() - kept.keys() - {"lora_dropout"})
    again = load_adapter(load_model(ModelSection(), cpu, "fp32"), tmp_path).peft_config["default"]
    assert {key: getattr(again, key) for key in kept} == kept
