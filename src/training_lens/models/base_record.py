"""The identity of a base model: fingerprints of its files, read without loading it, and their record in a run."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from training_lens.config.schema import ModelSection
from training_lens.errors import AdapterError, ModelLoadingError
from training_lens.models.checkpoint_files import FLOATS, StoredTensor, stored_tensors
from training_lens.models.factory import weight_files
from training_lens.models.location import local_folder
from training_lens.utils.devices import DTYPES, Precision
from training_lens.utils.integrity import read_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)

SAMPLE_BYTES = 65_536  # of each tensor, from its middle: 300 tensors are 20 MB to read, whatever the model's size
PIECE_BYTES, PIECES = 2**20, 64  # of a file, evenly spread over it; one of at most 64 MiB is read whole
DECIDING = ("config.json", "generation_config.json")  # besides the weights, these decide what a base computes


def fingerprint_base(model: ModelSection) -> str | None:
    """A sha256, in hexadecimal, of every tensor's name, type, shape and a sample of its values.

    Independent of how the tensors are spread over files. It detects retrained weights, which differ everywhere, but not
    a single value that changed outside the samples. None if a hub's model is not in the local cache.
    """
    folder = local_folder(model)
    if folder is None:
        return None
    digests = [_digest_tensor(tensor) for _, tensor in sorted(stored_tensors(folder).items())]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def base_record(model: ModelSection) -> dict[str, Any]:
    """The record of the base that a run trains on, for metadata/base.json.

    `files` are hashes of a sample of each file (a small file whole); `sha256` are hashes of whole files where they are
    free, as the names of files in a hub's cache.
    """
    folder = local_folder(model)
    files = base_files(folder) if folder else []
    return {
        "id": model.id,
        "revision": model.revision,
        "weights": fingerprint_base(model),
        "files": {path.name: sample_hash(path) for path in files},
        "sha256": {
            path.name: target.name
            for path in files
            if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", (target := path.resolve()).name)
        },
    }


def base_files(folder: Path) -> list[Path]:
    """The files that decide what a base computes."""
    return [path for name in (*DECIDING, *weight_files(folder)) if (path := folder / name).is_file()]


def sample_hash(path: Path) -> str:
    """The sha256 of a file's size and of pieces spread over it. Reads at most 64 MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    step = max(PIECE_BYTES, (size - PIECE_BYTES) // (PIECES - 1))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def check_base(record: Path, model: ModelSection) -> bool:
    """Compare the base `model` with the one that an adapter was trained on.

    Args:
        record: the base.json of the run that trained it.

    Returns:
        Whether the base is known to be the same: older runs have no record, hub models may not be local yet.

    Raises:
        AdapterError: a file of the base has changed, and model.accept_changed_base is not set.
    """
    folder = local_folder(model)
    trained_on = read_sealed(record) if record.is_file() else {}
    if folder is None or not trained_on.get("weights"):
        return False
    recorded: dict[str, str] = trained_on.get("files", {})
    known = {path.name: path for path in base_files(folder) if path.name in recorded}
    changed = [name for name, path in known.items() if sample_hash(path) != recorded[name]]
    if not changed and fingerprint_base(model) != trained_on["weights"]:  # the same tensors in other files do not count
        changed = weight_files(folder)
    if changed:
        message = (
            f"the adapter was trained on another base than '{model.id}' is now: {record} says that "
            f"{', '.join(changed)} in {folder} changed since."
        )
        if not model.accept_changed_base:
            raise AdapterError(
                f"{message} Restore the base that it was trained on, train again on this one, or accept this one: "
                "model.accept_changed_base=true."
            )
        logger.warning("%s It is accepted: model.accept_changed_base.", message)
    return not changed


def require_local_folder(model: ModelSection) -> Path:
    """The folder of the model's files.

    Raises:
        ModelLoadingError: the files of a hub's model are not in the local cache.
    """
    folder = local_folder(model)
    if folder is None:
        raise ModelLoadingError(f"model.id: the files of '{model.id}' are not in the local cache. Download it again.")
    return folder


def _digest_tensor(tensor: StoredTensor) -> bytes:
    """The sha256 of its name, type, shape and sample."""
    size = tensor.end - tensor.start
    with tensor.file.open("rb") as file:
        file.seek(tensor.start + max(0, size - SAMPLE_BYTES) // 2)
        sample = file.read(min(SAMPLE_BYTES, size))
    described = json.dumps([tensor.name, tensor.kind, list(tensor.shape)]).encode()
    return hashlib.sha256(described + sample).digest()


def stored_precision(model: ModelSection) -> Precision:
    """The dtype of most weights in the model's files; fp32 if it is none of fp32, bf16 and fp16.

    Raises:
        ModelLoadingError: the files of a hub's model are not in the local cache.
    """
    sizes: Counter[torch.dtype] = Counter()
    for tensor in stored_tensors(require_local_folder(model)).values():
        if tensor.kind in FLOATS:
            sizes[FLOATS[tensor.kind]] += tensor.end - tensor.start
    most = max(sizes, key=sizes.__getitem__, default=torch.float32)
    return next((name for name, dtype in DTYPES.items() if dtype == most), "fp32")
