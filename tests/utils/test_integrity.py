"""A file that holds its own hash: whatever single bit of it changes, in the hash's own key too, is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from training_lens.errors import DamagedFileError
from training_lens.utils.file_schemas import SCHEMAS, find_type_error
from training_lens.utils.files import write_json
from training_lens.utils.integrity import read_line, read_sealed, safe_save, seal_line, verify_seal, write_sealed

VALUES = {"step": 3, "files": {"a": "b"}}


def flips(content: bytes) -> Iterator[bytes]:
    for bit in range(8 * len(content)):
        yield content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def is_refused(read: Callable[[Path], Any], path: Path) -> bool:
    try:
        return bool(read(path) == VALUES)  # in white space, which is no part of the values
    except DamagedFileError:
        return True


def test_no_flipped_bit_of_a_sealed_object_is_read(tmp_path: Path) -> None:
    write_sealed(tmp_path / "sealed.json", VALUES)
    for number, changed in enumerate(flips((tmp_path / "sealed.json").read_bytes())):
        (tmp_path / "changed.json").write_bytes(changed)
        assert is_refused(read_sealed, tmp_path / "changed.json"), f"bit {number}: {changed!r}"


def test_a_number_that_is_not_finite_is_read_back_as_null(tmp_path: Path) -> None:
    """The summary of a run whose loss is NaN is not a damaged file."""
    write_sealed(tmp_path / "sealed.json", {"loss": float("nan"), "steps": [1, float("inf")]})
    assert read_sealed(tmp_path / "sealed.json") == {"loss": None, "steps": [1, None]}


def test_no_flipped_bit_of_a_line_is_read() -> None:
    line = seal_line(VALUES).encode()
    assert read_line(line) == VALUES
    assert all(read_line(changed) in (None, VALUES) for changed in flips(line))


def test_no_flipped_bit_of_a_sealed_binary_file_is_read(tmp_path: Path) -> None:
    safe_save({"x": torch.arange(4.0)}, tmp_path / "sealed.safetensors")
    verify_seal(tmp_path / "sealed.safetensors")
    for number, changed in enumerate(flips((tmp_path / "sealed.safetensors").read_bytes())):
        (path := tmp_path / f"{number}.safetensors").write_bytes(changed)
        with pytest.raises(DamagedFileError):
            verify_seal(path)


def test_what_earlier_versions_wrote_without_a_hash_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_json(tmp_path / "old.json", {**VALUES, "sha256": "0" * 64})
    assert read_sealed(tmp_path / "old.json") == {**VALUES, "sha256": "0" * 64}
    assert read_line('{"a": 1, "b": "01234567"}') == {"a": 1, "b": "01234567"}
    save_file({"x": torch.arange(4.0)}, tmp_path / "old.safetensors", {"by": "training-lens"})
    verify_seal(tmp_path / "old.safetensors")


@pytest.mark.parametrize("value", [1.5, [0], {"": None}], ids=str)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_value_of_another_type_is_named_by_its_file_and_key(tmp_path: Path, name: str, value: Any) -> None:
    for key in SCHEMAS[name]:
        fault = find_type_error(name, {key: value, "unknown to us": value})
        assert not fault or fault.startswith(f"{key}")
    text = next(key for key in SCHEMAS[name] if find_type_error(name, {key: value}))
    write_sealed(tmp_path / name, {text: value})
    with pytest.raises(DamagedFileError, match=rf"{name} has a wrong value. {text}"):
        read_sealed(tmp_path / name)
