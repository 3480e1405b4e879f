"""Written weights pass where each is the base's with its update, rounded once: nothing lost, weakened or touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_cases import slow_but
from tiny_models import tiny_model

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import MergeError
from training_lens.merging.merge_tensors import merge_weights, save_delta, save_merged
from training_lens.merging.weight_update import MergeOutput, check_weights
from training_lens.models.adapters import attach, load_adapter, save_adapter, trainable_parameters
from training_lens.models.factory import load_model
from training_lens.utils.devices import DTYPES

CPU = torch.device("cpu")
BASE = ModelSection(dtype="fp32")
KINDS: list[dict[str, Any]] = [
    {"variant": "rslora", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    {"use_dora": True, "modules_to_save": ["norm"]},
    {"init": "pissa"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},  # tied: both ends are trained as one
    {"target_modules": ["embed_tokens", "q_proj"]},  # tied: one end alone changes
    {"target_modules": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
]
RIGHT = [*((kind, "bf16") for kind in KINDS), (KINDS[0], "fp16"), (KINDS[1], "fp32"), (KINDS[4], "fp32")]
Write = Callable[..., MergeOutput]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Trains (at random) an adapter of the given kind, merges it, and says what was written."""

    def written(
        base: ModelSection = BASE, dtype: Any = "bf16", scale: float = 1.0, delta: bool = False, **section: Any
    ) -> MergeOutput:
        torch.manual_seed(0)
        model = attach(load_model(base, CPU, "fp32"), PeftSection(r=4, **section))
        for _, parameter in trainable_parameters(model):
            parameter.data += 0.003 * torch.randn_like(parameter)
        adapter, folder = tmp_path / "adapter", tmp_path / "merged"
        adapter.mkdir()
        folder.mkdir()
        save_adapter(model, adapter)
        folded = merge_weights(load_adapter(load_model(base, CPU, "fp32"), adapter), scale, delta=delta)
        if delta:
            save_delta(folded, folder, DTYPES[dtype], "5GB")
        else:
            save_merged(folded, base, folder, dtype, "5GB")
        return MergeOutput(folder, base, adapter, CPU, dtype, scale, delta)

    return written


@pytest.fixture
def gpt2(tmp_path: Path) -> ModelSection:
    """A saved GPT-2: Conv1D layers, whose weights are the other way round."""
    tiny_model("GPT2").save_pretrained(tmp_path / "gpt2")
    return ModelSection(id=str(tmp_path / "gpt2"), dtype="fp32")


def passes(written: MergeOutput) -> bool:
    checks = check_weights(written)
    assert checks[0].measured > 0  # rounding is never nothing
    return all(check.is_ok for check in checks)


def rewrite(written: MergeOutput, change: Callable[[dict[str, torch.Tensor]], None]) -> MergeOutput:
    weights = load_file(written.folder / "model.safetensors")
    change(weights)
    save_file(weights, written.folder / "model.safetensors", {"format": "pt"})
    return written


@pytest.mark.parametrize(
    ("section", "dtype"),
    slow_but([(KINDS[2], "bf16"), (KINDS[0], "fp16"), (KINDS[1], "fp32")], RIGHT),
    ids=str,
)
def test_a_right_merge_passes(write: Write, section: dict[str, Any], dtype: str) -> None:
    assert passes(write(dtype=dtype, **section))


@pytest.mark.parametrize("section", slow_but([KINDS[3]], [KINDS[1], KINDS[3], KINDS[5]]), ids=str)
def test_a_right_delta_passes(write: Write, section: dict[str, Any]) -> None:
    assert passes(write(delta=True, **section))


@pytest.mark.parametrize("dora", [False, True])
def test_weights_the_other_way_round_and_part_of_an_update_pass(write: Write, gpt2: ModelSection, dora: bool) -> None:
    assert passes(write(gpt2, use_dora=dora, scale=-0.5))


@pytest.mark.parametrize("bits", slow_but(["4bit"], ["4bit", "8bit"]))
def test_a_packed_base_counts_as_its_dequantized_weights(write: Write, bits: Any) -> None:
    pytest.importorskip("bitsandbytes")
    assert passes(write(ModelSection(dtype="fp32", quantization=bits), dtype="bf16"))


def test_one_modules_lost_update_is_found(write: Write) -> None:
    name = "model.layers.2.self_attn.v_proj.weight"
    before = load_model(BASE, CPU, "fp32").get_parameter(name)

    def lose(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = before.to(torch.bfloat16)

    changed, others = check_weights(rewrite(write(), lose))
    assert changed.measured > 1 and changed.where == name and others.is_ok


@pytest.mark.parametrize("section", slow_but([{}], [{}, {"use_dora": True}]), ids=str)
def test_an_update_that_is_three_percent_short_is_found(write: Write, section: dict[str, Any]) -> None:
    from dataclasses import replace

    assert not passes(replace(write(scale=0.97, **section), scale=1.0))


@pytest.mark.slow
def test_a_single_row_that_no_update_changes_is_found(write: Write) -> None:
    def touch(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][1023] *= 1.01

    changed, others = check_weights(rewrite(write(), touch))
    assert changed.is_ok and others.measured == 2 and "model.embed_tokens.weight" in others.where  # tied: its head, too


@pytest.mark.slow
def test_what_is_no_number_is_found(write: Write) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan

    assert check_weights(rewrite(write(), spoil))[0].measured == math.inf


def test_a_delta_that_lacks_or_adds_a_tensor_is_found(write: Write) -> None:
    written = write(delta=True, target_modules=["q_proj"])
    weights = load_file(written.folder / "delta.safetensors")
    lost = weights.pop("model.layers.1.self_attn.q_proj.weight")
    weights["model.layers.1.self_attn.k_proj.weight"] = lost
    save_file(weights, written.folder / "delta.safetensors")
    changed, others = check_weights(written)
    assert changed.measured == math.inf and changed.where == "model.layers.1.self_attn.q_proj.weight"
    assert others.measured == 1 and others.where == "model.layers.1.self_attn.k_proj.weight"


def test_an_update_of_a_weight_that_the_base_has_not_is_refused(write: Write) -> None:
    written = write(target_modules=["q_proj"])
    file = written.adapter / "adapter_model.safetensors"
    save_file({name.replace("layers.0.", "layers.9."): t for name, t in load_file(file).items()}, file)
    with pytest.raises(MergeError, match=r"update of 'model.layers.9.self_attn.q_proj.weight', and embedded no such"):
        check_weights(written)
