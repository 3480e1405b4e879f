"""The `gguf` package, imported only here: files that llama.cpp and Ollama load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def require_gguf() -> Any:
    """The gguf package, whose absence the plan of an export has refused."""
    import gguf

    return gguf


def open_writer(path: Path, architecture: str, values: Mapping[str, Any]) -> Any:
    """A writer of a new file with `values`: texts, numbers, and lists of these."""
    writer = require_gguf().GGUFWriter(path, architecture)
    for key, value in values.items():
        _add_value(writer, key, value)
    return writer


def _add_value(writer: Any, key: str, value: Any) -> None:
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds[list] = writer.add_array
    kinds[type(value)](key, value)


def write_tensors(writer: Any, tensors: Iterable[tuple[str, np.ndarray[Any, Any], Any]]) -> None:
    """Write header, values and tensors: triples of name, data as stored, and its type of `GGMLQuantizationType`."""
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_values(path: Path) -> dict[str, Any]:
    """The file's values by key."""
    reader = require_gguf().GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}


def read_tensors(path: Path) -> dict[str, Any]:
    """The file's tensors as stored, mapped from the file; see `load_tensor`."""
    return {tensor.name: tensor for tensor in require_gguf().GGUFReader(path).tensors}


def load_tensor(stored: Any) -> Tensor:
    """A stored tensor as float32, in the order of dimensions of PyTorch."""
    data = require_gguf().quants.dequantize(stored.data, stored.tensor_type)
    return torch.from_numpy(np.array(data, dtype=np.float32)).view(*(int(n) for n in reversed(stored.shape)))
