"""A merged folder is its base's files with the adapter's changes: same names, same shapes, same bytes elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import ModelLoadingError
from training_lens.merging.merge_tensors import merge_weights, save_merged
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.checkpoint_files import read_header
from training_lens.models.factory import load_model
from training_lens.utils.files import read_json, write_json

CPU = torch.device("cpu")
IDS = torch.arange(3, 19)[None]
SIZES = {"vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
Save = Callable[..., ModelSection]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves a model of random weights, and gives the section that names it."""

    def saved(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> ModelSection:
        tiny_models.tiny_model(kind, dtype, **SIZES | more).save_pretrained(tmp_path / "base")
        return ModelSection(id=str(tmp_path / "base"), dtype="fp32")

    return saved


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}


def merged(base: ModelSection, folder: Path, dtype: Any = None, **section: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """What the adapter computes, and the weights of the folder that it is merged into."""
    torch.manual_seed(0)
    model = attach(load_model(base, CPU, "fp32"), PeftSection(r=2, **section))
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        wanted = model.eval()(input_ids=IDS).logits
    folder.mkdir()
    save_merged(merge_weights(model), base, folder, dtype, "5GB")
    return wanted, weights(folder)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = load_model(ModelSection(id=str(folder), dtype="fp32"), CPU, "fp32")(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("section", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}], ids=str)
def test_experts_keep_the_names_of_the_bases_files(
    save: Save, tmp_path: Path, kind: str, section: dict[str, Any]
) -> None:
    base = save(kind, **EXPERTS)
    before = weights(base.id)
    wanted, after = merged(base, tmp_path / "merged", **section)
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    touched = ("_proj", "experts", "router", "gate", "mlp") if section else ("_proj", "experts")
    assert before.keys() - same and all(any(part in name for part in touched) for name in before.keys() - same)
    assert (logits(tmp_path / "merged") - wanted).abs().max() < 1e-4
    assert (tmp_path / "merged/config.json").read_bytes() == (Path(base.id) / "config.json").read_bytes()


def test_names_that_only_older_files_have_stay(save: Save, tmp_path: Path) -> None:
    """A base that was saved without its decoder's prefix, and has tensors that no class of today has a place for."""
    base = save("Llama", tie_word_embeddings=True)
    bare = {name.removeprefix("model."): tensor for name, tensor in weights(base.id).items()}
    bare["rotary_emb.inv_freq"] = torch.rand(4)
    save_file(bare, Path(base.id) / "model.safetensors", {"format": "pt"})
    wanted, after = merged(base, tmp_path / "merged")
    assert after.keys() == bare.keys() and torch.equal(after["rotary_emb.inv_freq"], bare["rotary_emb.inv_freq"])
    assert (logits(tmp_path / "merged") - wanted).abs().max() < 1e-4


def test_each_tensor_keeps_its_number_type_unless_one_is_asked_for(save: Save, tmp_path: Path) -> None:
    base = save("Llama", torch.bfloat16)
    mixed = {name: t.float() if "norm" in name else t for name, t in weights(base.id).items()}
    save_file(mixed, Path(base.id) / "model.safetensors", {"format": "pt"})
    _, kept = merged(base, tmp_path / "kept")
    assert {n: t.dtype for n, t in kept.items()} == {n: t.dtype for n, t in mixed.items()}
    assert read_json(tmp_path / "kept/config.json")["dtype"] == "bfloat16"
    _, wide = merged(base, tmp_path / "wide", "fp32")
    assert {t.dtype for t in wide.values()} == {torch.float32}
    assert read_json(tmp_path / "wide/config.json")["dtype"] == "float32"


def test_ends_that_come_apart_are_both_written(save: Save, tmp_path: Path) -> None:
    base = save("Llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in weights(base.id)
    for end in ("embed_tokens", "lm_head"):
        wanted, after = merged(base, tmp_path / end, target_modules=[end])
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= after.keys()
        assert read_json(tmp_path / end / "config.json")["tie_word_embeddings"] is False
        assert (logits(tmp_path / end) - wanted).abs().max() < 1e-4


def test_config_json_stays_in_the_bases_own_form(save: Save, tmp_path: Path) -> None:
    base = save("Llama")
    own = read_json(Path(base.id) / "config.json")
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    older = {key: value for key, value in own.items() if key not in ("rope_parameters", "dtype")} | {
        "rope_theta": 5e5,
        "rope_scaling": {**rope, "original_max_position_embeddings": 16},
        "torch_dtype": "float32",
        "a_key_of_later": [1, None],
    }
    write_json(Path(base.id) / "config.json", older)
    wanted, _ = merged(base, tmp_path / "same")
    assert (tmp_path / "same/config.json").read_bytes() == (Path(base.id) / "config.json").read_bytes()
    assert (logits(tmp_path / "same") - wanted).abs().max() < 1e-4
    merged(base, tmp_path / "half", "bf16")
    assert read_json(tmp_path / "half/config.json") == older | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("old_names", [False, True])
def test_a_vision_tower_stays_byte_for_byte(tmp_path: Path, old_names: bool) -> None:
    import transformers

    text = tiny_models.SIZES | SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=VISION | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    before = weights(tmp_path / "base")
    if not old_names:
        state = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "base").state_dict()
        before = {name: tensor.contiguous().clone() for name, tensor in state.items() if name != "lm_head.weight"}
        save_file(before, tmp_path / "base/model.safetensors", {"format": "pt"})
    base = ModelSection(id=str(tmp_path / "base"), dtype="fp32")
    wanted, after = merged(base, tmp_path / "merged", target_modules=r".*language_model.*q_proj")
    assert after.keys() == before.keys() and [n for n in before if "vision" in n]
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert len(changed) == 2 and all(name.endswith("q_proj.weight") and "vision" not in name for name in changed)
    assert (logits(tmp_path / "merged") - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "requires a buffer"),
        ((10**18).to_bytes(8, "little"), "its header has 1,000,000,000,000,000,000 bytes"),
        ((4).to_bytes(8, "little") + b"[1] ", "no attribute"),
        ((16).to_bytes(8, "little") + b'{"a": {"x": 1}} ', "data_offsets"),
        ((2**20).to_bytes(8, "little") + b"[" * 2**20, "deep"),
    ],
)
def test_what_is_no_safetensors_file_is_said(tmp_path: Path, content: bytes, fault: str) -> None:
    (path := tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadingError, match=rf"{path} is not a safetensors file \(.*{fault}.*Copy or download"):
        list(read_header(path))
