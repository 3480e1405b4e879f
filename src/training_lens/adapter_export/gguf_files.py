"""GGUF files: an adapter for llama.cpp, and a whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from training_lens.adapter_export.folded_lora import FoldedModule, pad_to_one_rank
from training_lens.adapter_export.gguf_architectures import common_settings
from training_lens.adapter_export.gguf_package import (
    load_tensor,
    open_writer,
    read_tensors,
    read_values,
    require_gguf,
    write_tensors,
)
from training_lens.adapter_export.gguf_tensors import GgufNames, convert_weights
from training_lens.adapter_export.model_ends import find_head, has_tied_ends
from training_lens.errors import AdapterError
from training_lens.merging.weight_update import LowRankUpdate

ADAPTER, MODEL = "adapter.gguf", "model.gguf"
Kind = Literal["f32", "f16", "bf16", "q8_0"]
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # of llama.cpp: what most of a file's tensors are
KEPT_EXACT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "position_embd.weight",
    "rope_freqs.weight",
)  # float32, as llama.cpp


def write_gguf_adapter(model: Any, modules: Sequence[FoldedModule], path: Path) -> None:
    """A LoRA for llama.cpp in float32: `blk.0.attn_q.weight.lora_a` and `.lora_b`, with alpha equal to the rank.

    llama.cpp multiplies an update by alpha / r, and knows no other scale.

    Raises:
        AdapterError: llama.cpp has no such architecture, or no place for a module.
    """
    names = GgufNames.find(model.config)
    padded = pad_to_one_rank(modules)
    tensors = dict(_adapter_tensors(names, model, padded))
    values = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(padded[0].rank),
        "general.file_type": FILE_TYPES["f32"],
    }
    exact = require_gguf().GGMLQuantizationType.F32
    writer = open_writer(path, names.architecture.name, values)
    write_tensors(writer, ((name, tensor.contiguous().numpy(), exact) for name, tensor in tensors.items()))


def _adapter_tensors(names: GgufNames, model: Any, modules: Sequence[FoldedModule]) -> Iterator[tuple[str, Tensor]]:
    is_tied, head = has_tied_ends(model), find_head(model)
    for module in modules:
        if is_tied and (module.is_embedding or module.path == head):
            raise AdapterError(
                f"'{module.path}' shares its weight with the other end of the model, and llama.cpp has one tensor for "
                "both: an adapter of one end cannot be written. Merge it: --merged writes the two ends apart."
            )
        name = names.rename_weight(f"{module.path}.weight")
        if module.is_embedding:  # llama.cpp reads A by token: (tokens, rank)
            yield f"{name}.lora_a", module.a.T
            yield f"{name}.lora_b", module.b
            continue
        yield f"{name}.lora_a", module.a
        yield f"{name}.lora_b", names.arrange_rows(module.path, module.b)


def read_gguf_adapter(config: Any, path: Path, modules: Sequence[FoldedModule]) -> dict[str, LowRankUpdate]:
    """The updates in a GGUF adapter of `modules`, by names of weights, with rows in transformers' order.

    What else is in the file keeps its name there.
    """
    names, values, tensors = GgufNames.find(config), read_values(path), read_tensors(path)
    found = {}
    for module in modules:
        name = names.rename_weight(f"{module.path}.weight")
        if f"{name}.lora_a" not in tensors or f"{name}.lora_b" not in tensors:
            continue
        a, b = (load_tensor(tensors.pop(f"{name}.lora_{part}")) for part in "ab")
        order = names.architecture.row_order(module.path, names.config, len(b))
        b = b if order is None else b[torch.argsort(order)]
        factor = values["adapter.lora.alpha"] / b.shape[1]
        found[f"{module.path}.weight"] = LowRankUpdate(a.T if module.is_embedding else a, b, factor, None)
    nothing = torch.zeros(1, 1)
    return found | {name: LowRankUpdate(nothing, nothing, 0.0, None) for name in tensors}


def write_gguf_model(model: Any, tokenizer_values: Mapping[str, Any], kind: Kind, path: Path, name: str) -> None:
    """A whole model for llama.cpp, its weights rounded to `kind`. Memory: the rounded weights, beside the model.

    Norms, routers and vectors stay in float32. With q8_0, tensors whose row length is not a multiple of 32 are f16.

    Raises:
        AdapterError: llama.cpp has no such architecture, or no place for a weight.
    """
    names = GgufNames.find(model.config)
    settings = common_settings(names.config) | names.architecture.settings(names.config)
    values = {f"{names.architecture.name}.{key}": value for key, value in settings.items()}
    general = {"general.type": "model", "general.name": name, "general.file_type": FILE_TYPES[kind]}
    version = {"general.quantization_version": 2} if kind == "q8_0" else {}
    writer = open_writer(path, names.architecture.name, general | version | values | dict(tokenizer_values))
    weights = convert_weights(names, model, model.state_dict().items(), is_tied=has_tied_ends(model))
    write_tensors(writer, (_store(name, tensor, kind) for name, tensor in weights))


def _store(name: str, tensor: Tensor, kind: Kind) -> tuple[str, np.ndarray[Any, Any], Any]:
    gguf = require_gguf()
    data = tensor.detach().float().cpu().contiguous().numpy()
    stored = gguf.GGMLQuantizationType[choose_kind(name, tensor, kind).upper()]
    return name, gguf.quants.quantize(data, stored), stored


def choose_kind(name: str, tensor: Tensor, kind: Kind) -> Kind:
    """How a tensor is stored in a file of `kind`."""
    if tensor.ndim < 2 or name.endswith((*KEPT_EXACT, ".bias")):
        return "f32"
    return "f16" if kind == "q8_0" and tensor.shape[-1] % 32 else kind
