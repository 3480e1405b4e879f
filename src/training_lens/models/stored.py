"""What the files of a base model hold, read without loading it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from training_lens.config.schema import ModelSection
from training_lens.errors import AdapterError
from training_lens.models.factory import WEIGHTS, locate, weight_files
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
    tensors = sorted(part for name in weight_files(folder) for part in _tensors(folder / name))
    return hashlib.sha256(b"".join(digest for _, digest in tensors)).hexdigest()


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


def local_folder(model: ModelSection) -> Path | None:
    """Where the model's files are on this machine; None where a hub's model is not in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    path = locate(model)
    if Path(path).is_dir():
        return Path(path)
    found = [try_to_load_from_cache(path, name, revision=model.revision) for name in WEIGHTS]
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def _tensors(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each tensor's name, and the sha256 of its name, type, shape and sample. Format: 8 bytes of the header's length
    (little-endian), the header (JSON), and the data that its offsets mean."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            file.seek(8 + length + start + max(0, end - start - SAMPLE_BYTES) // 2)
            said = json.dumps([name, entry["dtype"], entry["shape"]]).encode()
            yield name, hashlib.sha256(said + file.read(min(SAMPLE_BYTES, end - start))).digest()


def stored_precision(model: ModelSection) -> Precision:
    """The number type that the model's config says its weights are stored in; fp32 where it says none of the three."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        locate(model), revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return next((name for name, dtype in DTYPES.items() if dtype == config.dtype), "fp32")
