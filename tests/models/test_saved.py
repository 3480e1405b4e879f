"""A saved adapter goes on where it stood; what it is, its folder decides; what does not fit is refused early."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_cases import mark_slow
from tiny_models import tiny_model

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import AdapterError, ConfigurationError
from training_lens.models.adapter_files import CONFIG, WEIGHTS, adopt_saved_settings, check_fit, saved_shapes
from training_lens.models.adapters import (
    attach,
    check_adapter,
    load_adapter,
    restore_adapter,
    save_adapter,
    trainable_parameters,
)
from training_lens.models.factory import build_skeleton, load_model
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback
from training_lens.training.loop.trainer import Trainer
from training_lens.utils.files import read_json, write_json

Config = Callable[..., TrainingConfig]
IDS = torch.arange(40, 72).view(2, 16)


def base() -> Any:
    return load_model(ModelSection(), torch.device("cpu"), "fp32")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def saved(folder: Path, **section: Any) -> Any:
    """An adapter with random weights, saved."""
    adapted = attach(base(), PeftSection(**{"r": 4, **section}))
    for _, parameter in trainable_parameters(adapted):
        parameter.data += 0.02 * torch.randn_like(parameter)
    folder.mkdir(exist_ok=True)
    save_adapter(adapted, folder)
    return adapted


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "section",
    [
        {},
        mark_slow(
            {"variant": "rslora", "use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7.0}}
        ),
        mark_slow({"target_modules": r".*\.[qv]_proj", "modules_to_save": ["lm_head"]}),
        {"init": "pissa", "variant": "rslora"},
    ],
)
def test_going_on_starts_from_exactly_the_saved_adapter(section: dict[str, Any], tmp_path: Path) -> None:
    adapted = saved(tmp_path, **section)
    taken = adopt_saved_settings(PeftSection(from_adapter=str(tmp_path)))
    again = attach(base(), taken)
    torch.testing.assert_close(logits(again), logits(adapted), rtol=1e-5, atol=1e-5)
    assert all(p.dtype == torch.float32 for _, p in trainable_parameters(again))
    check_adapter(build_skeleton(ModelSection()), taken)


def test_the_folder_decides_what_the_section_leaves_open(tmp_path: Path) -> None:
    saved(tmp_path, variant="rslora", lora_alpha=12, use_dora=True, target_modules=["v_proj", "q_proj"])
    section = adopt_saved_settings(
        PeftSection(from_adapter=str(tmp_path), lora_dropout=0.1, target_modules=["v_proj", "q_proj"])
    )
    assert (section.variant, section.r, section.lora_alpha, section.use_dora) == ("rslora", 4, 12.0, True)
    assert section.target_modules == ["q_proj", "v_proj"] and section.lora_dropout == 0.1
    assert adopt_saved_settings(section) == section
    assert "lora_plus_ratio" not in section.model_fields_set


def test_a_plan_leaves_unset_what_was_never_set(small_config: Config, tmp_path: Path) -> None:
    plain = TrainingWrapper(small_config()).plan().config
    assert plain.peft.model_fields_set == {"r"}
    saved(tmp_path / "adapter")
    going_on = small_config(model={"id": "embedded"}, peft={"from_adapter": str(tmp_path / "adapter")})
    resolved = TrainingWrapper(going_on).plan().config
    assert resolved.peft.r == 4 and not {"lora_dropout", "lora_plus_ratio"} & resolved.peft.model_fields_set


def test_a_section_that_says_otherwise_is_refused_with_both(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        adopt_saved_settings(PeftSection(from_adapter=str(tmp_path), r=16, init="pissa"))
    assert len(caught.value.problems) == 2
    assert "peft.r: given 16, but the adapter in" in str(caught.value) and "has 4" in str(caught.value)


@pytest.mark.slow
def test_a_pissa_adapter_goes_on_as_a_lora_of_twice_the_rank(tmp_path: Path) -> None:
    adapted = saved(tmp_path, init="pissa")
    section = adopt_saved_settings(PeftSection(from_adapter=str(tmp_path)))
    assert (section.r, section.lora_alpha, section.init) == (8, 64.0, "default")
    torch.testing.assert_close(logits(attach(base(), section)), logits(adapted), rtol=1e-5, atol=1e-5)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(AdapterError, match=r"peft.from_adapter: no folder '.*mien'. Did you mean '.*mine'"):
        adopt_saved_settings(PeftSection(from_adapter=str(tmp_path / "mien")))
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(AdapterError, match=r"rows.jsonl' is a file. Give the folder of an adapter, or of a run"):
        adopt_saved_settings(PeftSection(from_adapter=str(tmp_path / "rows.jsonl")))
    section = PeftSection(from_adapter=str(tmp_path / "mine"))
    with pytest.raises(AdapterError, match=r"mine is not an adapter folder: adapter_config.json is missing"):
        adopt_saved_settings(section)
    saved(tmp_path / "mine")
    (tmp_path / "mine" / WEIGHTS).rename(tmp_path / "mine" / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is missing \(adapter_model.bin may run code"):
        adopt_saved_settings(section)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "holds a IA3 adapter"),
        ({"init_lora_weights": "pissa_niter_4"}, "started as pissa_niter_4, which changed the base's weights"),
        ({"bias": "all", "layers_to_transform": [0]}, "uses layers_to_transform, bias|uses bias, layers_to_transform"),
        ({"target_modules": None}, "does not say target_modules"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, **values)
    with pytest.raises(AdapterError, match=message):
        adopt_saved_settings(PeftSection(from_adapter=str(tmp_path)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", "abc", r"r: given 'abc', expected a whole number"),
        ("r", -4, r"r: given -4, expected at least 1"),
        ("lora_alpha", "x", r"lora_alpha: given 'x', expected a number"),
        ("lora_alpha", [1], r"lora_alpha: given \[1\]"),
        ("target_modules", ["q_proj", 3], r"target_modules: given "),
        ("target_modules", {"q_proj": 1}, r"target_modules: given "),
        ("modules_to_save", 7, r"modules_to_save: given 7"),
        ("use_dora", "perhaps", r"use_dora: given 'perhaps'"),
        ("rank_pattern", {"q_proj": "high"}, r"rank_pattern.q_proj: given 'high'"),
        ("rank_pattern", ["q_proj"], r"rank_pattern: given \['q_proj'\]"),
        ("peft_type", ["LORA"], r"holds a \['LORA'\] adapter"),
        ("layers_pattern", {"a": 1}, "uses layers_pattern"),
    ],
)
def test_values_of_wrong_type_are_named_with_file_and_key(key: str, value: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, **{key: value})
    with pytest.raises(AdapterError, match=message) as caught:
        adopt_saved_settings(PeftSection(from_adapter=str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_files_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    section = adopt_saved_settings(PeftSection(from_adapter=str(tmp_path)))
    (tmp_path / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is broken"):
        check_adapter(build_skeleton(ModelSection()), section)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config.json is no valid JSON"):
        adopt_saved_settings(section)


def test_the_adapter_of_another_base_is_refused_by_its_shapes(tmp_path: Path) -> None:
    saved(tmp_path, target_modules=["q_proj"])
    other = tiny_model()
    with pytest.raises(AdapterError, match=r"is the adapter of another base: \d+ of its tensors do not fit"):
        check_adapter(other, adopt_saved_settings(PeftSection(from_adapter=str(tmp_path))))


def test_another_name_with_fitting_shapes_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path)
    edit(tmp_path, base_model_name_or_path="some-org/base")
    with caplog.at_level(logging.WARNING, "training_lens"):
        check_adapter(build_skeleton(ModelSection()), adopt_saved_settings(PeftSection(from_adapter=str(tmp_path))))
    assert "was trained on 'some-org/base'; its shapes fit" in caplog.text


@pytest.mark.slow
def test_training_goes_on_from_a_runs_loss_and_lowers_it(small_config: Config, tmp_path: Path) -> None:
    first = TrainingWrapper(small_config()).train()
    config = small_config(peft={"from_adapter": first.run_dir, "r": 4}, training={"lr": 1e-3})
    with pytest.raises(ConfigurationError, match=r"peft.r: given 8, but the adapter in .* has 4"):
        TrainingWrapper(small_config(peft={"from_adapter": first.run_dir, "r": 8})).plan()
    seen: list[float] = []

    class Start(Callback):
        def on_train_start(self, trainer: Trainer) -> None:
            assert trainer.validation is not None
            report = trainer._evaluate_dataset(trainer.validation)
            assert report is not None
            seen.append(report.loss)

    second = TrainingWrapper(config, callbacks=(Start(),)).train()
    assert seen[0] == pytest.approx(first.validation_loss, abs=1e-6)
    assert second.validation_loss is not None and second.validation_loss < seen[0]


@pytest.mark.parametrize("harm", ["nan", "inf", "bf16", "alpha", "pattern"])
def test_an_adapter_that_is_not_finite_is_refused_wherever_it_is_loaded_or_written(
    embedded_run: RunFolder, tmp_path: Path, harm: str
) -> None:
    folder = Path(shutil.copytree(embedded_run.adapter, tmp_path / "adapter"))
    model = load_adapter(base(), folder)
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[-1]
    if harm in ("alpha", "pattern"):
        changed = {"lora_alpha": math.inf} if harm == "alpha" else {"alpha_pattern": {"q_proj": math.nan}}
        (folder / CONFIG).write_text(json.dumps(read_json(folder / CONFIG) | changed))  # NaN, as others write it
    else:
        tensors[name] = tensors[name].to(torch.bfloat16 if harm == "bf16" else torch.float32)
        tensors[name].view(-1)[-1] = math.nan if harm == "nan" else -math.inf
        save_file(tensors, folder / WEIGHTS)
    refused = pytest.raises(AdapterError, match=r"is not finite: .*the first is")
    with refused:
        load_adapter(base(), folder)
    with refused:
        restore_adapter(model, folder)
    with refused:
        check_fit(folder, saved_shapes(folder), "base")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(math.nan)
    with refused:
        save_adapter(model, tmp_path / "new")


def test_an_adapter_names_no_module_to_import_and_no_key_twice(embedded_run: RunFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_run.adapter, tmp_path / "adapter"))
    settings = read_json(folder / CONFIG)
    write_json(folder / CONFIG, settings | {"megatron_config": {"a": 1}, "megatron_core": "antigravity"})
    with pytest.raises(AdapterError, match="an adapter runs no code here"):
        load_adapter(base(), folder)
    text = json.dumps(settings).replace("{", '{"r": 512, ', 1)
    (folder / CONFIG).write_text(text)
    with pytest.raises(AdapterError, match="the key 'r' stands twice"):
        load_adapter(base(), folder)
