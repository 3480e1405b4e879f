"""A model's weights under llama.cpp's names, with their rows in its order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from training_lens.adapter_export.gguf_architectures import GgufArchitecture, find_architecture, rope_factors
from training_lens.adapter_export.gguf_package import require_gguf
from training_lens.adapter_export.model_ends import find_head
from training_lens.errors import AdapterError

LEFT_OUT = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class GgufNames:
    """Names and order of rows of one model's weights in llama.cpp."""

    architecture: GgufArchitecture
    config: Any  # of the text model
    mapping: Any  # gguf's own table of names

    @staticmethod
    def find(model_config: Any) -> GgufNames:
        """Those of the model that a config describes.

        Raises:
            AdapterError: llama.cpp has no such architecture, or computes it otherwise.
        """
        gguf, found, text = require_gguf(), find_architecture(model_config), model_config.get_text_config()
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)
        return GgufNames(found, text, gguf.get_tensor_name_map(kind, text.num_hidden_layers))

    def rename_weight(self, name: str) -> str:
        """llama.cpp's name of a weight: 'blk.0.attn_q.weight'.

        Raises:
            AdapterError: it has no place for it.
        """
        plain = name.replace("language_model.", "")
        if plain.endswith("sinks"):
            plain = f"{plain}.weight"
        found: str | None = self.mapping.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise AdapterError(f"--to gguf: llama.cpp's {self.architecture.name} has no place for '{name}'.")
        return found

    def arrange_rows(self, path: str, tensor: Tensor) -> Tensor:
        """The rows (outputs) of a module's weight, bias or B in llama.cpp's order."""
        order = self.architecture.row_order(path, self.config, len(tensor))
        return tensor if order is None else tensor[order]


def convert_weights(
    names: GgufNames, model: Any, weights: Iterable[tuple[str, Tensor]], *, is_tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model as llama.cpp has them: names, and tensors of the given dtype.

    Args:
        weights: names and tensors of the model's state dict, perhaps with other values.
        is_tied: embedding and output head are one weight, and the head is left out.

    Raises:
        AdapterError: llama.cpp has no place for a weight.
    """
    head = find_head(model)
    if not is_tied and not names.architecture.has_head:
        raise AdapterError(
            f"--to gguf: llama.cpp's {names.architecture.name} has no output head of its own, and this model's is not "
            "tied to its embedding."
        )
    for name, tensor in weights:
        if name.endswith(LEFT_OUT) or (is_tied and name == f"{head}.weight"):
            continue
        path, _, last = name.rpartition(".")
        if "experts" in name and tensor.ndim > 1 and last != "weight":
            yield from _split_experts(names, name, tensor)
            continue
        yield names.rename_weight(name), _arrange(names, model, path, last, tensor)
    factors = rope_factors(names.config)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _arrange(names: GgufNames, model: Any, path: str, last: str, tensor: Tensor) -> Tensor:
    if tensor.ndim == 1 and names.architecture.norm_shift and path.endswith("norm"):
        return tensor + names.architecture.norm_shift
    if last == "weight" and type(model.get_submodule(path)).__name__ == "Conv1D":
        tensor = tensor.T  # (in, out) -> (out, in)
    return names.arrange_rows(path, tensor)


def _split_experts(names: GgufNames, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Fused experts: gate and up are (experts, 2 width, in), or GPT-OSS's interleaved (experts, in, 2 width)."""
    path, _, last = name.rpartition(".")
    is_bias, is_interleaved = last.endswith("_bias"), names.architecture.name == "gpt-oss"
    kind = "bias" if is_bias else "weight"
    turned = tensor if is_bias or not is_interleaved else tensor.swapaxes(1, 2)  # (experts, out, in)
    if not last.startswith("gate_up_proj"):
        yield names.rename_weight(f"{path}.down_proj.{kind}"), turned
        return
    halves = (turned[:, ::2], turned[:, 1::2]) if is_interleaved else turned.chunk(2, 1)
    for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
        yield names.rename_weight(f"{path}.{part}.{kind}"), half
