"""GGUF files hold the model's weights and the adapter's updates under llama.cpp's names; what it lacks is refused."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_variants import VARIANTS, adapt
from tiny_models import build_tiny_tokenizer, tiny_config, tiny_model

from training_lens.adapter_export.export_plan import ExportOptions
from training_lens.adapter_export.export_run import export_adapter
from training_lens.adapter_export.folded_lora import fold_updates
from training_lens.adapter_export.gguf_architectures import ARCHITECTURES, find_architecture, rope_factors
from training_lens.adapter_export.gguf_checks import check_gguf_weights
from training_lens.adapter_export.gguf_files import Kind, read_gguf_adapter, write_gguf_adapter, write_gguf_model
from training_lens.adapter_export.gguf_package import load_tensor, read_tensors, read_values
from training_lens.adapter_export.gguf_tokenizer import BYTE, CONTROL, StopTokens, name_splitting, tokenizer_values
from training_lens.adapter_export.update_checks import check_updates
from training_lens.errors import AdapterError, ConfigurationError, MergeError
from training_lens.merging.weight_update import load_updates
from training_lens.models.adapters import save_adapter

pytest.importorskip("gguf")
VOCABULARY = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(97)]}


@pytest.mark.parametrize(
    ("kind", "variant"), [("Llama", "rslora, patterns"), ("Qwen2", "pissa"), ("GPT2", "rslora"), ("GPTNeoX", "lora")]
)
def test_a_gguf_adapter_read_back_is_the_trained_one(kind: str, variant: str, tmp_path: Path) -> None:
    peft = {k: v for k, v in VARIANTS[variant].items() if "pattern" not in k or kind == "Llama"}
    adapted = adapt(tiny_model(kind), **peft)
    save_adapter(adapted, tmp_path)
    modules = fold_updates(adapted, 0.7, "a GGUF adapter")
    write_gguf_adapter(adapted.get_base_model(), modules, tmp_path / "adapter.gguf")
    read = read_gguf_adapter(adapted.config, tmp_path / "adapter.gguf", modules)
    checks = check_updates(load_updates(tmp_path), 0.7, read)
    assert all(check.is_ok for check in checks), checks
    values, tensors = read_values(tmp_path / "adapter.gguf"), read_tensors(tmp_path / "adapter.gguf")
    ranks = {tensor.shape[1] for name, tensor in tensors.items() if name.endswith(".lora_a")}
    assert ranks == {values["adapter.lora.alpha"]} and values["general.type"] == "adapter"  # so alpha / r is 1
    assert len(tensors) == 2 * len(modules) and all(name.startswith("blk.") for name in tensors)


def test_queries_in_llama_cpps_order_turn_as_those_of_transformers() -> None:
    """llama.cpp turns neighbours 2i, 2i+1 by an angle, transformers i, i + d/2: the same numbers in another order."""
    from transformers.models.llama.modeling_llama import rotate_half

    config = tiny_config("Llama")
    width = config.head_dim
    order = find_architecture(config).row_order("model.layers.0.self_attn.q_proj", config, 32)
    assert order is not None
    query, angles = torch.randn(4, width), torch.rand(width // 2)
    turned = query * angles.cos().repeat(2) + rotate_half(query) * angles.sin().repeat(2)
    pairs = torch.view_as_complex(query.flatten()[order].view(4, -1, 2).contiguous())
    there = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()
    torch.testing.assert_close(there, turned.flatten()[order])


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_merged_models_every_weight_is_checked(kind: Kind, tmp_path: Path) -> None:
    from training_lens.merging.merge_tensors import merge_weights

    save_adapter(adapt(tiny_model(), **VARIANTS["rslora, patterns"]), tmp_path)
    updates, path = load_updates(tmp_path), tmp_path / "model.gguf"
    merged = merge_weights(adapt(tiny_model(), **VARIANTS["rslora, patterns"]), 0.7).model
    write_gguf_model(merged, VOCABULARY, kind, path, "tiny")
    checks = check_gguf_weights(path, tiny_model(), updates, 0.7, kind)
    assert all(check.is_ok for check in checks), checks
    worst, _ = check_gguf_weights(path, tiny_model(), updates, 0.75, kind)
    assert worst.measured > 1
    del updates["model.layers.1.self_attn.k_proj.weight"]
    worst, _ = check_gguf_weights(path, tiny_model(), updates, 0.7, kind)
    assert worst.where == "blk.1.attn_k.weight"


def test_norms_of_gemma_and_llama3s_frequencies_are_those_that_llama_cpp_multiplies_with(tmp_path: Path) -> None:
    model = tiny_model("Gemma3Text", sliding_window=16, num_hidden_layers=6, query_pre_attn_scalar=8)
    write_gguf_model(model, VOCABULARY, "f32", tmp_path / "model.gguf", "tiny")
    tensors = read_tensors(tmp_path / "model.gguf")
    torch.testing.assert_close(load_tensor(tensors["output_norm.weight"]), 1 + model.model.norm.weight)
    assert "output.weight" not in tensors  # tied
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = tiny_config("Llama", rope_parameters=rope | {"rope_theta": 5e5, "original_max_position_embeddings": 64})
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = rope_factors(config)
    assert factors is not None
    plain = 5e5 ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    torch.testing.assert_close(plain / factors, scaled)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("Cohere", {}, "models of type 'cohere' cannot be written .* these can: falcon, gemma2"),
        ("Gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100, and not head_dim, 8"),
        ("Qwen3Moe", {"norm_topk_prob": False}, "router's weights do not add up to 1"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "scaled by 'dynamic'",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(kind: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        find_architecture(tiny_config(kind, **changes))


def test_every_architecture_of_the_table_is_one_of_llama_cpp() -> None:
    import gguf

    assert {found.name for found in ARCHITECTURES.values()} <= set(gguf.MODEL_ARCH_NAMES.values())


def test_an_adapter_of_one_end_of_tied_weights_is_refused(tmp_path: Path) -> None:
    adapted = adapt(tiny_model(tie_word_embeddings=True), target_modules=["embed_tokens"])
    modules = fold_updates(adapted, 1.0, "a GGUF adapter")
    with pytest.raises(AdapterError, match=r"'model.embed_tokens' shares its weight with the other end"):
        write_gguf_adapter(adapted.get_base_model(), modules, tmp_path / "adapter.gguf")


def test_tokens_keep_their_ids_and_kinds() -> None:
    tokenizer = build_tiny_tokenizer("turns")
    values = tokenizer_values(tokenizer, len(tokenizer) + 3, StopTokens(6, None))
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert tokens[:-3] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) and len(tokens) == len(kinds)
    assert kinds[tokenizer.convert_tokens_to_ids("<0x0A>")] == BYTE
    assert kinds[tokenizer.convert_tokens_to_ids("<|end|>")] == CONTROL
    assert values["tokenizer.ggml.model"] == "llama" and values["tokenizer.ggml.add_space_prefix"]
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    with pytest.raises(AdapterError, match=r"tokens, and the model 9 rows for them"):
        tokenizer_values(tokenizer, 9, StopTokens(6, None))


def test_how_text_is_split_is_named_or_refused() -> None:
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert name_splitting(bytewise, None) == "gpt-2"
    assert name_splitting({"type": "Sequence", "pretokenizers": [digits, bytewise]}, None) == "smollm"
    with pytest.raises(AdapterError, match=r"splits text by a rule that is not known here .*Whitespace"):
        name_splitting({"type": "Whitespace"}, None)


@pytest.mark.usefixtures("forked_python")
def test_a_gguf_adapter_that_lost_a_module_is_removed(
    write_adapter: Callable[..., Path], export_config: Callable[..., Any], tmp_path: Path
) -> None:
    folder, options = write_adapter(**VARIANTS["patterns"]), ExportOptions("gguf", tmp_path / "out")
    other = export_adapter(export_config(folder), options)
    assert other.report["weights_read_back"] and (other.output / "Modelfile").is_file()
    is_compared = find_spec("llama_cpp") is not None
    assert other.report["verified"] is other.report["answers_compared"] is is_compared
    assert is_compared or "pip install llama-cpp-python, and export again" in other.report["not_computed"]

    def lose(building: Path) -> None:
        adapted = adapt(tiny_model(), **VARIANTS["patterns"])
        modules = fold_updates(adapted, 1.0, "a GGUF adapter")[:-1]
        write_gguf_adapter(adapted.get_base_model(), modules, building / "adapter.gguf")

    with pytest.raises(MergeError, match=r"missing or not the adapter's: 1"):
        export_adapter(export_config(folder), ExportOptions("gguf", tmp_path / "new"), on_written=lose)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ExportOptions("plain", merged=True), "--merged goes with --to gguf"),
        (ExportOptions("gguf", dtype="q8_0"), "--dtype goes with --to gguf --merged"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    write_adapter: Callable[..., Path], export_config: Callable[..., Any], options: ExportOptions, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        export_adapter(export_config(write_adapter()), options)
