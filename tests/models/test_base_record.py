"""A base's weights are told from others at the same path, however they are spread over files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training_lens import embedded
from training_lens.config.schema import ModelSection
from training_lens.errors import AdapterError
from training_lens.models.base_record import base_record, check_base, fingerprint_base, stored_precision
from training_lens.models.factory import load_model
from training_lens.utils.integrity import write_sealed


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded.PATHS[embedded.MODEL], tmp_path / "model"))


def section(folder: Path) -> ModelSection:
    return ModelSection(id=str(folder))


def test_a_copy_is_the_same_and_so_are_shards(copied: Path, tmp_path: Path) -> None:
    whole = fingerprint_base(ModelSection())
    assert whole == fingerprint_base(section(copied)) and len(str(whole)) == 64
    model = load_model(ModelSection(dtype="bf16"), torch.device("cpu"), "fp32")
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert fingerprint_base(section(tmp_path / "shards")) == whole


def test_one_changed_tensor_is_another_base(copied: Path, tmp_path: Path) -> None:
    write_sealed(tmp_path / "base.json", base_record(section(copied)))
    assert check_base(tmp_path / "base.json", section(copied))
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"another base than '.*model' is now: .*base.json says that model.saf"):
        check_base(tmp_path / "base.json", section(copied))
    accepted = ModelSection(id=str(copied), accept_changed_base=True)
    assert not check_base(tmp_path / "base.json", accepted)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_any_flipped_bit_of_a_small_base_is_seen(copied: Path, tmp_path: Path, name: str) -> None:
    write_sealed(tmp_path / "base.json", base_record(section(copied)))
    whole = (copied / name).read_bytes()
    for place in range(0, len(whole), 1 + len(whole) // 7):
        (copied / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(AdapterError, match=f"{name} in .* changed since"):
            check_base(tmp_path / "base.json", section(copied))


def test_the_same_tensors_in_other_files_are_the_same_base(copied: Path, tmp_path: Path) -> None:
    write_sealed(tmp_path / "base.json", base_record(section(copied)))
    load_model(section(copied), torch.device("cpu"), "bf16").save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(copied / name, tmp_path / "shards" / name)
    assert check_base(tmp_path / "base.json", section(tmp_path / "shards"))


def test_without_a_record_nothing_is_known(tmp_path: Path) -> None:
    assert not check_base(tmp_path / "base.json", ModelSection())


def test_the_number_type_is_that_of_the_files(copied: Path, tmp_path: Path) -> None:
    assert stored_precision(ModelSection()) == "bf16"
    load_model(ModelSection(), torch.device("cpu"), "fp32").save_pretrained(tmp_path / "wide")
    assert stored_precision(section(tmp_path / "wide")) == "fp32"
