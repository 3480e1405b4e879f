# ruff: noqa: E501 (a line a case reads best)
"""Files, own presets and files of other trainers: what each sets, which goes over which, and what is said."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from training_lens.config.compose import compose
from training_lens.config.ignored_keys import ORIGINS
from training_lens.errors import ConfigurationError
from training_lens.utils.logging import TrainingLogger, setup_logging


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What is logged."""
    logger = logging.getLogger("training_lens.config.compose")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog.messages
    logger.removeHandler(caplog.handler)


def write(name: str, values: dict[str, Any] | str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = values if isinstance(values, str) else json.dumps(values)  # JSON is YAML
    path.write_text(text, encoding="utf-8")
    return name


def problem(*arguments: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        compose(*arguments)
    return str(caught.value)


def test_a_later_file_goes_over_an_earlier_one_and_says_so(caplog: pytest.LogCaptureFixture, said: list[str]) -> None:
    first = write("a.yaml", {"training": {"lr": 0.1, "epochs": 3}, "peft.r": 4})
    second = write("b (2).json", {"training.lr": 0.2, "peft": {"lora_alpha": 8}})
    config = compose([first, second], ["training.epochs=5"])
    assert (config.training.lr, config.training.epochs, config.peft.r, config.peft.lora_alpha) == (0.2, 5, 4, 8)
    assert "--config b (2).json goes over a.yaml; it changes training.lr" in caplog.messages


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"peft": {"r": 4, "r": 8}}', "the key 'r' stands twice"),
        ("a.yaml", "peft: {r: 4, r: 8}", "no valid YAML"),
        (
            "a.json",
            '{"training.lr": 0.1, "training": {"lr": 0.2}}',
            "training.lr is given twice, 0.1 and 0.2; keep one",
        ),
        ("a.yaml", "output: {experiment_name: 2024}", "output.experiment_name: given 2024"),
    ],
)
def test_a_value_is_never_lost_in_a_file(name: str, text: str, message: str) -> None:
    assert message in problem(write(name, text))


def test_dotted_keys_and_a_section_of_one_file_are_joined() -> None:
    config = compose(write("a.json", {"training.lr": 0.1, "training": {"epochs": 7}}))
    assert (config.training.lr, config.training.epochs) == (0.1, 7)


def test_presets_of_ones_own_are_chosen_like_the_packaged(caplog: pytest.LogCaptureFixture, said: list[str]) -> None:
    write("config/experiment/my run.yaml", {"defaults": ["quick_test"], "training": {"lr": 0.1}, "peft.r": 3})
    write("config/experiment/quick_test.yaml", {"defaults": ["quick_test"], "peft": {"r": 5}})
    write("config/sweep/mine.yaml", "# @package _global_\nsweep:\n  name: mine\n  trials: 2\n")
    config = compose(None, ["+experiment=my run", "sweep=mine", "inference=base"])
    assert (config.training.lr, config.peft.r, config.data.max_examples) == (0.1, 3, 160)  # the packaged one is below
    assert (config.sweep.name, config.inference.adapter) == ("mine", "none")
    assert "preset config/experiment/my run.yaml" in caplog.messages
    message = problem(None, ["+experiment=my_run"])
    assert "there are: default, default-full, dora, qlora, quick_test, and in config/experiment: my run" in message
    assert "Did you mean 'my run'?" in message


def test_presets_that_cannot_be_are_named() -> None:
    write("config/experiment/a.yaml", {"defaults": ["b"]})
    write("config/experiment/b.yaml", {"defaults": ["a"]})
    write("config/experiment/c.yaml", {"defaults": [{"optimizer": "adam"}]})
    write("config/experiment/d.yaml", {"training": {"lrr": 1}})
    assert "build on each other in a circle" in problem(None, ["+experiment=a"])
    assert "config/experiment/c.yaml: defaults: {'optimizer': 'adam'} names no preset" in problem(
        None, ["experiment=c"]
    )
    assert "training.lrr: unknown key; did you mean 'training.lr'?" in problem(None, ["+experiment=d"])


@pytest.mark.parametrize(
    ("values", "suggested"),
    [
        ({"lora": {"r": 8, "alpha": 16, "dropout": 0.1, "target_modules": ["q_proj"]}},
         ["lora.r: unknown key; did you mean 'peft.r'", "'peft.lora_alpha'", "'peft.lora_dropout'",
          "'peft.target_modules'"]),
        ({"model": {"name": "x"}, "training": {"learning_rate": 1e-4, "num_train_epochs": 3}},
         ["'model.id'", "'training.lr'", "'training.epochs'"]),
        ({"optimizer": {"name": "adamw_torch"}, "scheduler": {"type": "cosine"}, "quantization": {"load_in_4bit": True}},
         ["'training.optimizer=adamw'", "'training.scheduler'", "'model.quantization=4bit'"]),
        ({"dataset": {"train_file": "a", "max_length": 512}}, ["'data.train'", "'model.seq_len'"]),
        ({"lora_config": {"rank": 8}, "training_args": {"per_device_train_batch_size": 2}},
         ["'peft.r'", "'training.batch_size'"]),
    ],
)  # fmt: skip
def test_each_key_of_a_nested_config_is_called_by_its_name_here(values: dict[str, Any], suggested: list[str]) -> None:
    message = problem(write("a.json", values))
    assert all(part in message for part in suggested), message


LLAMA_FACTORY = {
    "model_name_or_path": "m", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all",
    "lora_rank": 8, "dataset": "identity,alpaca_en_demo", "template": "llama3", "cutoff_len": 2048, "overwrite_cache": True,
    "preprocessing_num_workers": 16, "output_dir": "saves", "logging_steps": 10, "plot_loss": True, "report_to": "none",
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 180000000, "resume_from_checkpoint": None,
}  # fmt: skip


def test_a_file_of_another_trainer_is_read_once_its_own_names_are_answered(
    caplog: pytest.LogCaptureFixture, said: list[str]
) -> None:
    file = write("sft.yaml", yaml.safe_dump(LLAMA_FACTORY))
    assert "do_train: unknown key, of another trainer; --from hf or llama-factory" in problem(file)
    message = problem(file, ["data.train=rows.jsonl"], None, "llama-factory")
    assert message == "template: given 'llama3', which LLaMA-Factory alone knows; set data.template"
    config = compose(file, ["data.train=rows.jsonl", "data.template=auto"], None, "llama-factory")
    assert (config.model.id, config.peft.r, config.training.lr, config.data.train) == ("m", 8, 1e-4, ["rows.jsonl"])
    line = [line for line in caplog.messages if "set aside" in line][-1]
    assert all(name in line for name in ("stage", "template", "dataset", "plot_loss", "ddp_timeout"))


@pytest.mark.parametrize("origin", ORIGINS)
def test_what_would_change_the_result_is_refused(origin: str) -> None:
    file = write("a.yaml", {"adam_beta2": 0.95, "neftune_noise_alpha": 5, "logging_strategy": "steps", "nonsense": 1})
    message = problem(file, (), None, origin)
    assert "adam_beta2: given 0.95. It would change the result" in message and "expected 0.999" in message
    assert "neftune_noise_alpha: given 5" in message and "nonsense: unknown key" in message
    assert "logging_strategy" not in message


def test_what_was_said_before_the_run_had_a_folder_is_in_its_log(folder: Path) -> None:
    setup_logging()
    compose(write("a.yaml", {"plot_loss": True}), (), None, "llama-factory")
    with TrainingLogger(folder / "run.log"):
        pass
    assert "a.yaml: set aside, as nothing here depends on them: plot_loss" in (folder / "run.log").read_text()
    logging.getLogger("training_lens").handlers.clear()
