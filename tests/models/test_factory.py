"""Models load from folders; what is missing or wrong is said at once, with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from training_lens import embedded
from training_lens.config.schema import ModelSection
from training_lens.errors import ConfigurationError, ModelLoadingError
from training_lens.models.factory import (
    build_skeleton,
    check_weights,
    load_model,
    read_facts,
    resolve_seq_len,
)

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may break."""
    return Path(shutil.copytree(embedded.PATHS[embedded.MODEL], tmp_path / "model"))


def test_facts_come_without_weights(folder: Path) -> None:
    facts = read_facts(ModelSection(id=str(folder)))
    assert (facts.width, facts.positions, facts.vocabulary) == (192, 512, 1024)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_are_frozen_and_of_the_dtype_asked(dtype: Any, expected: torch.dtype) -> None:
    model = load_model(ModelSection(dtype=dtype), CPU, "fp32")
    assert {p.dtype for p in model.parameters()} == {expected}
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadingError, match=r"holds no weights; expected model.safetensors"):
        read_facts(ModelSection(id=str(folder)))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadingError, match=r"only pytorch_model.bin, which may run code"):
        read_facts(ModelSection(id=str(folder)))


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelLoadingError, match=r"holds no config.json"):
        read_facts(ModelSection(id=str(folder)))


def test_a_missing_folder_suggests_the_nearest(folder: Path) -> None:
    with pytest.raises(ModelLoadingError, match=r"no folder .*modle'. Did you mean .*model'"):
        read_facts(ModelSection(id=str(folder.with_name("modle"))))


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    with pytest.raises(ModelLoadingError, match=r"configuration of .* cannot be loaded"):
        read_facts(ModelSection(id=str(folder)))


def test_broken_and_incomplete_weights_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.0.mlp" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    for use in (lambda model: load_model(model, CPU, "fp32"), check_weights):
        with pytest.raises(ModelLoadingError, match="lack 3 of the model's tensors"):
            use(ModelSection(id=str(folder)))
    (folder / "model.safetensors").write_bytes(b"no safetensors at all")
    with pytest.raises(ModelLoadingError, match=r"weights of .* cannot be loaded"):
        load_model(ModelSection(id=str(folder)), CPU, "fp32")


def test_weights_of_another_size_are_refused_as_in_loading(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.norm.weight": torch.ones(7)}, folder / "model.safetensors", {"format": "pt"})
    for use in (lambda model: load_model(model, CPU, "fp32"), check_weights):
        with pytest.raises(ModelLoadingError, match=r"another shape .*norm.weight has \(7,\), expected \(192,\)"):
            use(ModelSection(id=str(folder)))


@pytest.mark.parametrize("kind", ["GPT2", "Mixtral"])
def test_weights_that_are_renamed_tied_or_fused_in_loading_pass(kind: str, folder: Path) -> None:
    tiny_model(kind).save_pretrained(folder)
    check_weights(ModelSection(id=str(folder)))


def test_sharded_weights_are_checked_file_by_file(folder: Path) -> None:
    load_model(ModelSection(id=str(folder)), CPU, "fp32").save_pretrained(folder, max_shard_size="2MB")
    (folder / "model.safetensors").unlink()
    check_weights(ModelSection(id=str(folder)))
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ModelLoadingError, match=rf"{shard.name} is broken or missing"):
        check_weights(ModelSection(id=str(folder)))


def test_a_skeleton_of_foreign_code_needs_consent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    config = json.loads((folder / "config.json").read_text())
    ours = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": ours}))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ModelLoadingError, match=r"carries its own code. Read it, then set model.trust_remote_code"):
        build_skeleton(ModelSection(id=str(folder)))
    assert type(build_skeleton(ModelSection(id=str(folder), trust_remote_code=True))).__name__ == "OwnModel"


def test_an_unreachable_hub_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits {seconds} s to ask again"))
    with pytest.raises(
        ModelLoadingError, match=r"'some-org/no-model' is no local path, and the hub .* cannot be reached"
    ):
        read_facts(ModelSection(id="some-org/no-model"))


def test_offline_mode_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadingError, match=r"and its configuration cannot be loaded from the hub"):
        read_facts(ModelSection(id="some-org/no-model"))


def test_seq_len_is_held_against_the_positions() -> None:
    facts = read_facts(ModelSection())
    assert resolve_seq_len(ModelSection(), facts) == 512
    with pytest.raises(ConfigurationError, match="given 513, but 'embedded' has 512 positions"):
        resolve_seq_len(ModelSection(seq_len=513), facts)


def test_an_encoder_decoder_is_refused_by_its_class(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=16, architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelLoadingError, match=r"encoder-decoder \(T5ForConditionalGeneration\).*decoder-only model"):
        read_facts(ModelSection(id=str(tmp_path)))


def test_a_model_that_generates_no_text_is_refused_by_its_type(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig(hidden_size=16, architectures=["ViTModel"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelLoadingError, match=r"type 'vit' \(ViTModel\), which generates no text"):
        read_facts(ModelSection(id=str(tmp_path)))
