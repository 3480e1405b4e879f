"""Of each kind of model: what auto takes is what PEFT adapts, and all of it equals transformers and PEFT alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_cases import slow_but
from transformers import CONFIG_MAPPING

from training_lens import embedded
from training_lens.config.schema import PeftSection
from training_lens.errors import AdapterError, ModelLoadingError
from training_lens.models.adapters import adapted_modules, attach, check_adapter
from training_lens.models.experts import target_name
from training_lens.models.fast.engine import Engine
from training_lens.models.fast.install import unpackable_layers

VOCABULARY = {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.08}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {**VOCABULARY, **SIZES, **HEADS}
LATENT = {
    **TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_routed_experts": 4,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
               "num_position_embeddings": 16, "deepstack_visual_indexes": []}  # fmt: skip

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek": ("DeepseekV3ForCausalLM", LATENT),
    "shared expert": (
        "Qwen2MoeForCausalLM",
        {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 32},
    ),
    "mamba hybrid": (
        "BambaForCausalLM",
        {**TEXT, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
         "mamba_chunk_size": 16, "attn_layer_indices": [1]},
    ),
    "fused projections": ("Phi3ForCausalLM", {**TEXT, "sliding_window": 16}),
    "chunked": (
        "Llama4ForCausalLM",
        {**TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 16},
    ),
    "delta wrapper": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": {**TEXT, "head_dim": 8, "num_hidden_layers": 4, **DELTA}, "vision_config": QWEN_VISION},
    ),
    "wrapper": (
        "LlavaForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "llama"},
         "vision_config": {**VISION, "model_type": "clip_vision_model"}},
    ),
    "prefix wrapper": (
        "PaliGemmaForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "gemma", "head_dim": 8}, "projection_dim": 32,
         "vision_config": {**VISION, "model_type": "siglip_vision_model", "projection_dim": 32}},
    ),
}  # fmt: skip
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
LATENT = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]
FEED = ["down_proj", "gate_proj", "up_proj"]
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
ADAPTED = {
    "deepseek": sorted(LATENT + EXPERTS),
    "shared expert": sorted(ATTENTION + FEED + EXPERTS),
    "mamba hybrid": sorted([*ATTENTION, *FEED, "in_proj"]),
    "fused projections": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    "chunked": sorted(ATTENTION + FEED + EXPERTS),
    "delta wrapper": sorted([*ATTENTION, *FEED, "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj"]),
    "wrapper": sorted(ATTENTION + FEED),
}
LEFT_OUT = {
    "deepseek": {
        "gate": "routers",
        "gate_proj": "takes this name to mean the experts",
    },
    "shared expert": {"shared_expert_gate": "routers and gates"},
    "mamba hybrid": {"out_proj": "reads the weight itself", "conv1d": "not a linear layer"},
    "chunked": {"router": "routers"},
    "delta wrapper": {"qkv": "vision or audio tower", "conv1d": "not a linear layer"},
    "wrapper": {"linear_1": "vision or audio tower", "fc1": "vision or audio tower"},
}
SMALL = PeftSection(r=2, lora_alpha=4)
Folders = Callable[[str], Path]


def build_kind(name: str) -> Any:
    """A model of the kind, with random weights."""
    import transformers

    kind, values = KINDS[name]
    torch.manual_seed(1)
    found = getattr(transformers, kind)
    model = found._from_config(found.config_class(**values))
    return model.requires_grad_(False).eval()


def load_script(file: Path) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BASES = load_script(BENCHMARKS / "compat/bases.py")
REWRITTEN = list(BASES.MODELS)[list(BASES.MODELS).index("deepseek_v2") :]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The script that checks an architecture."""
    return load_script(BENCHMARKS / "architectures.py")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Saves a model of a kind with the embedded tokenizer, and gives the folder."""

    def save(kind: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"kind-{kind.replace(' ', '-')}"
        if not folder.is_dir():
            build_kind(kind).save_pretrained(folder)
            for file in embedded.PATHS[embedded.MODEL].glob("*token*.json"):
                shutil.copy(file, folder)
        return folder

    return save


@pytest.mark.parametrize("kind", ADAPTED)
def test_auto_takes_what_can_be_adapted_and_names_the_rest_with_its_reason(kind: str) -> None:
    model = build_kind(kind)
    adaptation = check_adapter(model, SMALL)
    assert adaptation.names == ADAPTED[kind]
    told = {name: omission.reason for omission in adaptation.left_out for name in omission.names}
    for name, reason in LEFT_OUT.get(kind, {}).items():
        assert reason in told[name]
    assert set(adaptation.adapted).isdisjoint(path for o in adaptation.left_out for path in o.modules)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("deepseek", "gate_proj", "PEFT takes this name to mean the experts"),
        ("deepseek", r".*layers\.0\.mlp\.down_proj", "PEFT takes this name to mean the experts"),
        ("mamba hybrid", "out_proj", "a BambaMixer reads the weight itself, past any adapter. Leave it out"),
        ("chunked", "router", "a Llama4Router computes more than a linear layer"),
    ],
)
def test_what_no_adapter_works_on_is_refused_by_name(kind: str, name: str, reason: str) -> None:
    targets = name if "*" in name else [name]
    with pytest.raises(AdapterError, match=reason):
        check_adapter(build_kind(kind), PeftSection(r=2, target_modules=targets))


@pytest.mark.parametrize("kind", ["shared expert", "wrapper"])
def test_what_auto_leaves_out_is_adapted_where_it_is_named(kind: str) -> None:
    """A gate and a vision tower are linear layers like others: who names them gets them."""
    name = {"shared expert": "shared_expert_gate", "wrapper": "fc1"}[kind]
    adaptation = check_adapter(build_kind(kind), PeftSection(r=1, target_modules=[name]))
    assert adaptation.names == [name]


def test_a_regular_expression_keeps_its_layers_where_peft_would_take_all() -> None:
    """PEFT replaces an expression by the last names that it matches, in models whose experts have other names now."""
    adapted = attach(build_kind("deepseek"), PeftSection(r=2, target_modules=r".*layers\.1\..*kv_b_proj"))
    assert adapted_modules(adapted) == ["model.layers.1.self_attn.kv_b_proj"]


def test_a_misspelt_expert_is_told_that_experts_are_no_layers() -> None:
    with pytest.raises(AdapterError, match=r"no module is called 'w1'.* The experts are no linear layers here"):
        check_adapter(build_kind("deepseek"), PeftSection(target_modules=["w1"]))


@pytest.mark.parametrize("kind", slow_but(["deepseek", "shared expert", "fused projections"], ADAPTED))
def test_loss_and_gradients_are_those_of_transformers_and_peft(kind: str, benchmark: Any, folder_of: Folders) -> None:
    """The plain model is of the class that config.json names, so the adapter's keys are that class's, too."""
    found = benchmark.compare_losses(folder_of(kind), SMALL)
    assert found["loss_difference"] < 1e-5
    assert found["gradient_difference"] < 1e-4
    assert found["without_gradient"] == 0


@pytest.mark.parametrize("kind", slow_but(["chunked"], ["mamba hybrid", "chunked", "delta wrapper"]))
def test_layers_that_see_across_examples_are_padded(kind: str) -> None:
    model = attach(build_kind(kind), SMALL)
    assert unpackable_layers(model)
    assert not Engine(model).can_pack


@pytest.mark.slow
def test_a_model_whose_tokens_see_those_behind_them_is_refused_before_the_first_step() -> None:
    with pytest.raises(ModelLoadingError, match="Give a model whose text is causal"):
        Engine(attach(build_kind("prefix wrapper"), SMALL))


def test_a_model_that_reads_text_otherwise_than_its_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_kind("wrapper")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **options: forward(input_ids=input_ids.flip(1), **options))
    with pytest.raises(ModelLoadingError, match="Give a model whose text is causal"):
        Engine(attach(model, SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepseek", "delta wrapper"])
def test_a_run_resumes_and_its_adapter_loads_in_plain_peft(
    kind: str, benchmark: Any, folder_of: Folders, tmp_path: Path
) -> None:
    folder = folder_of(kind)
    config, run, _ = benchmark.train(folder, tmp_path)
    assert benchmark.resume(config, run, tmp_path)
    _, found = benchmark.reload(folder, run.adapter)
    assert found["reload_difference"] < 1e-5 < found["effect"]
    record = json.loads((run.metadata / "adaptation.json").read_text())
    assert {target_name(path) for path in record["adapted"]} <= set(ADAPTED[kind])


@pytest.mark.parametrize("name", slow_but(list(REWRITTEN)[::3], REWRITTEN))
def test_adapters_on_kinds_that_peft_rewrites_load_again(name: str) -> None:
    """`check_adapter` refuses what PEFT would not find again, and adapters of other modules than were asked for."""
    kind, sizes = BASES.MODELS[name]
    model = BASES.build_model(CONFIG_MAPPING[kind](**sizes)).requires_grad_(False)
    adaptation = check_adapter(model, SMALL)
    assert {"o_proj", "out_proj"} & set(adaptation.names)
    assert not any("experts stay frozen" in omission.reason for omission in adaptation.left_out)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # each trains, resumes and is merged, beside whatever else the machine does
def test_all_shared_architectures_are_equal_or_refused(shared: Path, benchmark: Any, tmp_path: Path) -> None:
    builder = load_script(shared / "bench/architectures.py")
    for name in builder.M:
        builder.save(builder.build(name), tmp_path / name)
    BASES.main(embedded.PATHS[embedded.MODEL], tmp_path, REWRITTEN)
    for folder in sorted(tmp_path.iterdir()):
        found = benchmark.check(folder)
        if "refused" not in found:
            assert found["resumed_equal"], folder.name
            assert max(found[f"{what}_difference"] for what in ("loss", "reload", "merged")) < 1e-5, folder.name
            assert found["gradient_difference"] < 1e-4, folder.name
