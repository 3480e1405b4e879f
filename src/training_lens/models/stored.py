"""What the files of a base model hold, read without loading it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from training_lens.config.schema import ModelSection
from training_lens.errors import AdapterError, ModelLoadingError
from training_lens.models.checkpoint_files import FLOATS, StoredTensor, stored_tensors
from training_lens.models.location import WEIGHTS, locate
from training_lens.utils.devices import DTYPES, Precision
from training_lens.utils.files import read_json

SAMPLE_BYTES = 65_536  # of each tensor, from its middle: 300 tensors are 20 MB to read, whatever the model's size


def fingerprint(model: ModelSection) -> str | None:
    """A sha256, in hexadecimal, of every tensor's name, type, shape and a sample of its values.

    The same however the tensors are spread over files. It tells another training's weights, which differ all over; a
    single value changed outside the samples it does not. None where a hub's model is not in the local cache.
    """
    folder = local_folder(model)
    if folder is None:
        return None
    digests = sorted(_digests(stored_tensors(folder).values()))
    return hashlib.sha256(b"".join(digest for _, digest in digests)).hexdigest()


def base_record(model: ModelSection) -> dict[str, str | None]:
    """What a run keeps of the base that it trains on, in metadata/base.json."""
    return {"id": model.id, "revision": model.revision, "weights": fingerprint(model)}


def check_base(record: Path, model: ModelSection) -> bool:
    """Hold the base `model` against the one that an adapter was trained on.

    Args:
        record: the base.json of the run that trained it.

    Returns:
        Whether the two could be held together: an older run has no record, and a hub's model may not be here yet.

    Raises:
        AdapterError: the base's weights are others now.
    """
    trained_on = read_json(record)["weights"] if record.is_file() else None
    found = fingerprint(model) if trained_on else None
    if trained_on is None or found is None:
        return False
    if found != trained_on:
        raise AdapterError(
            f"the adapter was trained on other weights than '{model.id}' holds now: {record} says {trained_on[:16]}, "
            f"found {found[:16]}. Put the base back that it was trained on, or train again on this one."
        )
    return True


def require_local_folder(model: ModelSection) -> Path:
    """The folder of the model's files.

    Raises:
        ModelLoadingError: the files of a hub's model are not in the local cache.
    """
    folder = local_folder(model)
    if folder is None:
        raise ModelLoadingError(f"model.id: the files of '{model.id}' are not in the local cache. Download it again.")
    return folder


def local_folder(model: ModelSection) -> Path | None:
    """Where the model's files are on this machine; None where a hub's model is not in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    path = locate(model)
    if Path(path).is_dir():
        return Path(path)
    found = [try_to_load_from_cache(path, name, revision=model.revision) for name in WEIGHTS]
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def _digests(tensors: Iterable[StoredTensor]) -> Iterator[tuple[str, bytes]]:
    """Each tensor's name, and the sha256 of its name, type, shape and sample."""
    for tensor in tensors:
        size = tensor.end - tensor.start
        with tensor.file.open("rb") as file:
            file.seek(tensor.start + max(0, size - SAMPLE_BYTES) // 2)
            sample = file.read(min(SAMPLE_BYTES, size))
        described = json.dumps([tensor.name, tensor.kind, list(tensor.shape)]).encode()
        yield tensor.name, hashlib.sha256(described + sample).digest()


def stored_precision(model: ModelSection) -> Precision:
    """The number type of most of the weights in the model's files; fp32 where it is none of the three.

    Raises:
        ModelLoadingError: the files of a hub's model are not in the local cache.
    """
    sizes: Counter[torch.dtype] = Counter()
    for tensor in stored_tensors(require_local_folder(model)).values():
        if tensor.kind in FLOATS:
            sizes[FLOATS[tensor.kind]] += tensor.end - tensor.start
    most = max(sizes, key=sizes.__getitem__, default=torch.float32)
    return next((name for name, dtype in DTYPES.items() if dtype == most), "fp32")
