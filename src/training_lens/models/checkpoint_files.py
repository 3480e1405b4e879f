"""Edit a base's weight files: every tensor is copied under its own name, except those that changed.

transformers renames and fuses tensors while it loads a model (one tensor for all experts of a layer, other prefixes).
The written files have the names and shapes of the base's own files, which every version of transformers reads, and keep
tensors that the loaded class does not use, such as those of a vision tower.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_lens.errors import MergeError, ModelLoadingError
from training_lens.models.factory import weight_files
from training_lens.utils.files import write_json
from training_lens.utils.formatting import describe_error
from training_lens.utils.limits import load_bounded_json

HEADER_BYTES = 100_000_000  # the format's own limit
WEIGHTS = "model{suffix}.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. `kind` is the file's name of its dtype; `start` and `end` are byte offsets."""

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int

    def load_tensor(self) -> Tensor:
        """Its values, in its own dtype."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a local model's files, by name. Reads only the files' headers."""
    return {tensor.name: tensor for name in weight_files(folder) for tensor in read_header(folder / name)}


def read_header(path: Path) -> Iterable[StoredTensor]:
    """The tensors of one file. Format: 8 bytes of the header's length (little-endian), the header (JSON), the data.

    Raises:
        ModelLoadingError: it has another format.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > HEADER_BYTES:
                raise ValueError(f"its header has {length:,} bytes, expected at most {HEADER_BYTES:,}")
            header = load_bounded_json(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
                yield StoredTensor(path, name, str(entry["dtype"]), tuple(map(int, entry["shape"])), start, end)
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelLoadingError(
            f"{path} is not a safetensors file ({describe_error(error)}). Copy or download it again."
        ) from error


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of the checkpoint to write, from the base's files or from memory."""

    source: StoredTensor | Tensor
    dtype: torch.dtype | None  # None keeps that of the base's file

    @property
    def byte_size(self) -> int:
        """Its size in the file."""
        if isinstance(self.source, Tensor):
            return self.source.numel() * (self.dtype or self.source.dtype).itemsize
        stored = self.source.end - self.source.start
        return stored if self.dtype is None else stored // FLOATS[self.source.kind].itemsize * self.dtype.itemsize

    def load_tensor(self) -> Tensor:
        """Its values as written."""
        tensor = self.source if isinstance(self.source, Tensor) else self.source.load_tensor()
        return tensor.detach().to("cpu", self.dtype or tensor.dtype).contiguous()


def edit_checkpoint(
    stored: Mapping[str, StoredTensor], edits: Mapping[str, Tensor], dtype: torch.dtype | None, default: torch.dtype
) -> dict[str, WrittenTensor]:
    """The base's tensors with `edits` in place of those of the same name; new names are appended.

    Args:
        dtype: of all floating-point tensors; None: each keeps the base's own.
        default: the dtype of tensors that the base does not have, where `dtype` is None.
    """
    written = {}
    for name, tensor in stored.items():
        own = FLOATS.get(tensor.kind)
        written[name] = WrittenTensor(edits.get(name, tensor), own and (dtype or (own if name in edits else None)))
    added = {name: WrittenTensor(tensor, dtype or default) for name, tensor in edits.items() if name not in stored}
    return written | added


def write_checkpoint(tensors: Mapping[str, WrittenTensor], folder: Path, max_shard_size: str) -> None:
    """Write model.safetensors, or shards of at most `max_shard_size` and their index, one in memory at a time."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.byte_size,
        filename_pattern=WEIGHTS,
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].load_tensor() for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        total = sum(tensor.byte_size for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index, verbatim=True)


class CheckpointNames:
    """Maps the `stored` tensors of the base's files to the parameters of the loaded model.

    The model has no adapter modules, and records how transformers converted its weights.
    """

    def __init__(self, model: Any, stored: Mapping[str, StoredTensor]) -> None:
        self._model, self._stored = model, stored
        self._state: dict[str, Tensor] = model.state_dict()
        self._conversions = list(getattr(model, "_weight_conversions", None) or [])
        self._targets = {name: self._find_target(name) for name in stored}

    def find_edits(self, changed: Collection[str]) -> dict[str, Tensor]:
        """The changed parameters in the form and under the names of the base's files; new names are last.

        Args:
            changed: names of parameters; parameters tied to one of them change with it.

        Raises:
            MergeError: a converted tensor has another name or shape than in the base's files.
        """
        wanted = self._add_tied_names(changed)
        plain = {name: target for name, (target, converted) in self._targets.items() if not converted}
        edits = {name: self._state[target] for name, target in plain.items() if target in wanted}
        held = self._add_tied_names(set(plain.values()) & wanted)
        for group in self._group_by_conversion(wanted - held):
            edits |= self._revert_conversion(group)
        return edits

    def _find_target(self, name: str) -> tuple[str, bool]:
        """The parameter that a stored tensor fills (maybe an unknown name), and whether it is converted for that."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
        if target not in self._state and name in self._state:
            target, pattern = rename_source_key(name, [], [], prefix, self._state)
        return target, pattern is not None

    def _add_tied_names(self, names: Collection[str]) -> set[str]:
        """The names, and those of parameters tied to theirs."""
        places = {name: id(p) for name, p in self._model.named_parameters(remove_duplicate=False)}
        wanted = {places[name] for name in names if name in places}
        return {name for name, place in places.items() if place in wanted} | set(names)

    def _group_by_conversion(self, names: Collection[str]) -> list[list[str]]:
        """The parameters, grouped with all others that one conversion makes from the same stored tensors."""
        from transformers.core_model_loading import WeightConverter, apply_converters

        backwards = [c.reverse_transform() for c in self._conversions[::-1]]
        converters = [c for c in backwards if isinstance(c, WeightConverter)]
        places: dict[str, list[str]] = {}
        for name in self._state:
            place, pattern = apply_converters(name, converters)
            places.setdefault(place if pattern is not None else name, []).append(name)
        return [group for group in places.values() if not set(names).isdisjoint(group)]

    def _revert_conversion(self, group: list[str]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        # Some bases are stored with the prefix of their decoder, others without.
        prefix = f"{self._model.base_model_prefix}."
        found = {}
        for name, tensor in revert_weight_conversion(self._model, {n: self._state[n] for n in group}).items():
            candidates = (name, name.removeprefix(prefix), prefix + name)
            found[next((candidate for candidate in candidates if candidate in self._stored), name)] = tensor
        are_stored = any(target in group for target, _ in self._targets.values())  # else the parameter was tied
        for name, tensor in found.items() if are_stored else ():
            here = self._stored.get(name)
            if here is None or here.shape != tuple(tensor.shape):
                there = f"has shape {here.shape}" if here else "is not there"
                raise MergeError(
                    f"'{group[0]}' changed, and is stored in other tensors in the base's files; transformers turns it "
                    f"back into '{name}' of shape {tuple(tensor.shape)}, which {there}. Leave this module out of the "
                    "adapter, or serve the adapter itself."
                )
        return found
