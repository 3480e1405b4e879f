"""The two forms in PEFT's format: the adapter as it is, and a plain LoRA that any loader reads right."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from training_lens.adapter_export.folded_lora import FoldedModule, pad_to_one_rank, short_target_names
from training_lens.inference.session import Session
from training_lens.merging.weight_update import PREFIX
from training_lens.models.adapter_files import CONFIG, WEIGHTS, read_config
from training_lens.models.adapter_scale import scale_adapter
from training_lens.models.adapters import save_adapter
from training_lens.models.location import locate_model
from training_lens.utils.files import write_json


def write_peft(session: Session, scale: float, folder: Path) -> None:
    """The adapter's two files, copied; with a scale, saved again by PEFT with the update multiplied."""
    assert session.adapter is not None
    if scale != 1:
        scale_adapter(session.model, scale)
        save_adapter(session.model, folder)
    copied = (CONFIG,) if scale != 1 else (CONFIG, WEIGHTS)
    for name in copied:
        shutil.copyfile(session.adapter / name, folder / name)


def write_plain(session: Session, modules: Sequence[FoldedModule], folder: Path) -> None:
    """A LoRA of one rank whose alpha is that rank, so that alpha / r is 1 for every loader, in float32."""
    padded = pad_to_one_rank(modules)
    tensors: dict[str, Tensor] = {}
    for module in padded:
        a, b = ("lora_embedding_A", "lora_embedding_B") if module.is_embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{module.path}.{a}": module.a, f"{PREFIX}{module.path}.{b}": module.b}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, _plain_config(session, padded), verbatim=True)


def _plain_config(session: Session, modules: Sequence[FoldedModule]) -> dict[str, Any]:
    """Every key that a loader may read, also those at PEFT's defaults, so that none is guessed."""
    assert session.adapter is not None
    own, rank = read_config(session.adapter), modules[0].rank
    everything = [path for path, _ in session.model.get_base_model().named_modules() if path]
    originals = [path for path in everything if ".base_layer" not in path and ".lora_" not in path]
    config = {
        "peft_type": "LORA",
        "task_type": own.get("task_type"),
        "base_model_name_or_path": own.get("base_model_name_or_path") or locate_model(session.config.model),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": short_target_names([module.path for module in modules], originals),
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    return config | ({"fan_in_fan_out": True} if own.get("fan_in_fan_out") else {})
