"""An embedding that is smaller than its tokenizer's vocabulary: refused, or new rows are trained, saved and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from training_lens import TrainingConfig, TrainingWrapper, embedded
from training_lens.config.schema import ModelSection
from training_lens.errors import ModelLoadingError
from training_lens.merging.merge_plan import MergeOptions
from training_lens.merging.merge_run import merge_adapter
from training_lens.models.adapters import base_only, load_adapter
from training_lens.models.embedding_rows import required_rows, resize_embeddings
from training_lens.models.factory import build_skeleton, check_vocabulary, load_model, load_tokenizer
from training_lens.runs.run_folder import RunFolder

CPU = torch.device("cpu")
ADDED = ["<think>", "</think>", "<call>"]


@pytest.fixture(params=[False, True], ids=["apart", "tied"])
def grown(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A small model whose tokenizer got three tokens, which its embedding has no rows for."""
    folder = Path(shutil.copytree(embedded.PATHS[embedded.MODEL], tmp_path / "grown"))
    (folder / "model.safetensors").unlink()
    tokenizer = load_tokenizer(ModelSection())
    changes = {"vocab_size": required_rows(tokenizer), "num_hidden_layers": 1, "tie_word_embeddings": request.param}
    tiny_model(**changes).save_pretrained(folder)
    tokenizer.add_tokens(ADDED)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(folder: Path, place: Path, **model: Any) -> TrainingConfig:
    rows = [{"question": f"Think of {i}.", "answer": f"<think>{i}</think> It is {i}."} for i in range(16)]
    values = {
        "model": {"id": str(folder), "device": "cpu", "seq_len": 64, **model},
        "data": {"train": rows, "template": "plain"},
        "peft": {"r": 4},
        "training": {"max_steps": 3, "lr": 1e-2},
        "lens": {"report": False},
        "tracking": {"tensorboard": False},
        "output": {"base_output_dir": str(place)},
    }
    return TrainingConfig.model_validate(values)


def test_missing_rows_are_refused_with_the_way_to_add_them(grown: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadingError, match=r"model.resize_embeddings=true adds and trains the 3 missing rows"):
        TrainingWrapper(config_of(grown, tmp_path)).plan()


def test_a_tokenizer_of_another_model_is_refused() -> None:
    required = required_rows(load_tokenizer(ModelSection()))
    check_vocabulary(required, 1024, "embedded", False)
    with pytest.raises(ModelLoadingError, match=r"ids up to \d+, its embedding 97 rows"):
        check_vocabulary(required, 97, "x", False)


def test_new_rows_are_the_mean_and_old_ones_stay(grown: Path) -> None:
    before = load_model(ModelSection(id=str(grown)), CPU, "fp32").get_input_embeddings().weight
    section = ModelSection(id=str(grown), resize_embeddings=True)
    model = load_model(section, CPU, "fp32")
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[: len(before)], before)
    torch.testing.assert_close(weight[len(before) :], before.mean(0).expand(3, -1))
    assert model.config.vocab_size == len(weight) == len(before) + 3
    assert build_skeleton(section).get_output_embeddings().weight.shape == weight.shape
    assert resize_embeddings(model, 5) is model and len(model.get_input_embeddings().weight) == len(weight)


@pytest.mark.usefixtures("forked_python")
@pytest.mark.parametrize("grown", [pytest.param(False, id="apart", marks=pytest.mark.slow), True], indirect=True)
def test_new_rows_are_trained_saved_loaded_by_plain_peft_and_merged(grown: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = config_of(grown, tmp_path, resize_embeddings=True)
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    ours = load_adapter(load_model(ModelSection(id=str(grown), resize_embeddings=True), CPU, "fp32"), run.adapter)
    ids = torch.tensor([load_tokenizer(ModelSection(id=str(grown)))("<think>1</think>").input_ids])
    wanted = ours(input_ids=ids).logits
    plain = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    plain.resize_token_embeddings(wanted.shape[-1])
    torch.testing.assert_close(PeftModel.from_pretrained(plain, str(run.adapter))(input_ids=ids).logits, wanted)
    with base_only(ours):
        assert not torch.allclose(ours(input_ids=ids).logits[..., -3:], wanted[..., -3:])
    merged = merge_adapter(config.replace_keys(inference={"adapter": str(run.root)}), MergeOptions(dtype="fp32")).output
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == wanted.shape[-1]
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits, wanted)
