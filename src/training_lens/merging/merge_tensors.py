"""An adapter merged into the base's own weights: plain weights that any program loads without PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_lens.config.schema import ModelSection
from training_lens.errors import AdapterError
from training_lens.models.adapter_scale import adapter_layers, base_module
from training_lens.models.base_files import write_config
from training_lens.models.base_record import require_local_folder, stored_precision
from training_lens.models.checkpoint_files import CheckpointNames, edit_checkpoint, stored_tensors, write_checkpoint
from training_lens.models.embedding_rows import has_token_rows
from training_lens.models.experts import is_expert_adapter
from training_lens.models.omissions import is_linear
from training_lens.models.quantization import dequantize_model, is_quantized
from training_lens.utils.devices import DTYPES, Precision
from training_lens.utils.files import read_json

DELTA = "delta{suffix}.safetensors"


@dataclass(frozen=True)
class MergedModel:
    """A model without adapter modules, and names of its parameters in the state dict."""

    model: Any  # as transformers loaded it, in float32
    changed: tuple[str, ...]  # by the adapter; one name of tied parameters
    untied: tuple[str, ...]  # tied to another one in the base, and no longer
    was_quantized: bool  # the base's weights were in 4 or 8 bits, by the run's config or by the base's own


def check_mergeable(adapted: Any) -> None:
    """Refuse an adapter that has no plain weights.

    Raises:
        AdapterError: names the module: not a LoRA or DoRA on a linear layer, an embedding or experts.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    for path, layer in adapter_layers(adapted):
        base = base_module(layer)
        if isinstance(layer, LoraLayer) and not is_expert_adapter(layer):
            is_plain = all(isinstance(variant, DoraLinearVariant) for variant in layer.lora_variant.values())
            is_plain = is_plain and not any(layer.lora_bias.values())
            if not is_plain or not (is_linear(base) or isinstance(base, torch.nn.Embedding)):
                raise AdapterError(
                    f"'{path}' carries a {type(layer).__name__} on a {type(base).__name__} that cannot be merged; only "
                    "LoRA and DoRA on linear layers, embeddings and experts can. Serve the adapter itself."
                )


def merge_weights(adapted: Any, scale: float = 1.0, *, delta: bool = False) -> MergedModel:
    """Turn `adapted` into the plain model with weights W + scale dW, in float32; changed in place.

    dW is the adapter's update: s B A for LoRA (arXiv 2106.09685), m (W + s B A) / |W + s B A| - W for DoRA (arXiv
    2402.09353), and the trained minus the base's values of a module trained whole, and of rows of new tokens. A
    quantized base is dequantized first. Memory: 4 bytes a parameter, plus one module's update at a time.

    Args:
        scale: multiplies the update; 1 is the adapter as trained.
        delta: replace the changed weights by scale dW, not by the sum.

    Raises:
        AdapterError: a module's update is not finite.
    """
    was_quantized = is_quantized(adapted)
    model = dequantize_model(adapted.get_base_model()).float()
    changed = []
    for adapted_name, layer in adapter_layers(adapted):
        plain = base_module(layer)
        path = adapted_name.rpartition(".")[0] if is_expert_adapter(layer) else adapted_name
        for name, update in _compute_updates(layer, plain):
            if not torch.isfinite(update).all():
                raise AdapterError(f"the adapter's update of '{path}.{name}' is not finite: training diverged.")
            before = plain.get_parameter(name).detach()
            after = _add_update(before, update, scale, delta, _changed_rows(layer))
            owner, _, last = name.rpartition(".")
            # A new parameter: the old one may be another module's too, where weights are tied.
            setattr(plain.get_submodule(owner), last, torch.nn.Parameter(after, requires_grad=False))
            changed.append(f"{path}.{name}")
        model.set_submodule(path, plain)
    untied, tied = _settle_ties(model)
    return MergedModel(model, tuple(name for name in changed if name not in tied), tuple(untied), was_quantized)


@torch.no_grad()
def _compute_updates(layer: Any, plain: Any) -> Iterator[tuple[str, Tensor]]:
    """Names of the base module's parameters, and the adapter's update of each: float32, of the same shape or rows."""
    (name,) = layer.active_adapters
    if (rows := _changed_rows(layer)) is not None:
        yield "weight", layer.token_adapter.trainable_tokens_delta[name].detach().float() - plain.weight[rows]
    elif not hasattr(layer, "lora_variant"):  # trained whole
        trained = dict(layer.modules_to_save[name].named_parameters())
        yield from ((n, trained[n].detach().float() - p) for n, p in plain.named_parameters())
    elif name in layer.lora_variant:  # DoRA
        yield "weight", layer.lora_variant[name].merge_safe(layer, name, plain.weight) - plain.weight
    elif is_expert_adapter(layer):
        update = layer.get_delta_weight(name).float()
        yield layer.parameter_name, update.reshape(layer.get_param().shape)
    else:
        yield "weight", layer.get_delta_weight(name).float()


def _changed_rows(layer: Any) -> Tensor | None:
    """The ids of new tokens whose rows alone a layer of PEFT's changes; None: it changes all."""
    if not has_token_rows(layer):
        return None
    (name,) = layer.active_adapters
    return torch.tensor(layer.token_adapter.token_indices[name], device=layer.original_module.weight.device)


def _add_update(before: Tensor, update: Tensor, scale: float, delta: bool, rows: Tensor | None) -> Tensor:
    """The weight with its update, or with `delta` the update alone; of `rows`, all others keep every bit."""
    if rows is None:
        return scale * update if delta else before + scale * update
    if delta:
        return torch.zeros_like(before).index_copy(0, rows, scale * update)
    return before.index_copy(0, rows, before[rows] + scale * update)


def _settle_ties(model: Any) -> tuple[list[str], list[str]]:
    """Names of tied weights that are now untied, and of those tied again. The config is updated for the untied."""
    untied, tied = [], []
    for target, source in model.all_tied_weights_keys.items():
        if torch.equal(model.get_parameter(target), model.get_parameter(source)):
            owner, _, last = target.rpartition(".")
            setattr(model.get_submodule(owner), last, model.get_parameter(source))
            tied.append(target)
        else:
            untied.append(target)
    for target in untied:
        del model.all_tied_weights_keys[target]
    for config in (model.config, model.config.get_text_config()) if untied else ():
        config.tie_word_embeddings = False
    return untied, tied


def save_merged(
    merged: MergedModel, base: ModelSection, folder: Path, dtype: Precision | None, max_shard_size: str
) -> None:
    """Write config.json and the weights: the base's own files, except what the adapter changed.

    Args:
        base: what the adapter was merged into.
        dtype: of the written weights; None: each keeps the dtype that it has in the base's files.
        max_shard_size: of a file of weights, such as '5GB'.

    Raises:
        MergeError: a changed weight has no counterpart in the base's files.
    """
    own = require_local_folder(base)
    is_packed = "quantization_config" in read_json(own / "config.json")
    stored = {} if is_packed else stored_tensors(own)
    rewritten = list(merged.model.state_dict()) if merged.was_quantized else [*merged.changed, *merged.untied]
    edits = CheckpointNames(merged.model, stored).find_edits(rewritten)
    tensors = edit_checkpoint(stored, edits, dtype and DTYPES[dtype], DTYPES[dtype or stored_precision(base)])
    write_checkpoint(tensors, folder, max_shard_size)
    untied, trusted = bool(merged.untied), base.trust_remote_code
    write_config(own, folder, merged.model, dtype=dtype, untied=untied, trust_remote_code=trusted)


def save_delta(merged: MergedModel, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write the changed parameters alone, of a model merged with `delta`: delta.safetensors, or its shards."""
    from huggingface_hub import save_torch_state_dict

    state = {name: merged.model.get_parameter(name).detach().to(dtype) for name in merged.changed}
    save_torch_state_dict(state, str(folder), filename_pattern=DELTA, max_shard_size=max_shard_size)
