"""Flat configs of other trainers mean here what they meant there, or say what they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens.config.compose import compose
from training_lens.config.foreign_keys import BY_NAME, TABLE
from training_lens.config.keys import known_keys
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError

Load = Callable[..., TrainingConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def compose_file(*overrides: str, **values: Any) -> TrainingConfig:
        file = tmp_path / "training_config.json"
        file.write_text(json.dumps(values))
        return compose(str(file), overrides)

    return compose_file


def problems(load: Load, **values: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(**values)
    return "\n".join(caught.value.problems)


def test_every_name_leads_to_a_key_and_no_section_is_a_name() -> None:
    assert {flat.key for flat in TABLE} <= set(known_keys(TrainingConfig))
    assert len(BY_NAME) == sum(len(flat.names.split()) for flat in TABLE)
    assert not set(BY_NAME) & set(TrainingConfig.model_fields)


def test_a_flat_file_is_a_config(load: Load) -> None:
    config = load(
        model_name="m", lora_r=8, lora_alpha=16, lora_dropout=0.1, lora_target_modules=["q_proj", "v_proj"],
        learning_rate=2e-4, num_epochs=3, batch_size=4, gradient_accumulation_steps=2, max_length=512, seed=1,
        train_data=["a.json", "b.json"], val_data="c.json", output_dir="out",
    )  # fmt: skip
    assert (config.model.id, config.model.seq_len, config.output.base_output_dir) == ("m", 512, "out")
    assert (config.peft.r, config.peft.lora_alpha, config.peft.lora_dropout) == (8, 16, 0.1)
    assert config.peft.target_modules == ["q_proj", "v_proj"]
    assert (config.training.lr, config.training.epochs, config.training.seed) == (2e-4, 3, 1)
    assert (config.training.batch_size, config.training.gradient_accumulation_steps) == (4, 2)
    assert (config.data.train, config.data.validation) == (["a.json", "b.json"], ["c.json"])


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("optim", "adamw_torch", "adamw"),
        ("optim", "paged_adamw_8bit", "adamw_8bit"),
        ("lr_scheduler_type", "constant_with_warmup", "constant"),
        ("load_in_4bit", True, "4bit"),
        ("load_in_8bit", False, "none"),
        ("quantization_bit", 8, "8bit"),
        ("bf16", True, "bf16"),
        ("bf16", "auto", "auto"),
        ("fp16", False, "auto"),
        ("torch_dtype", "bfloat16", "bf16"),
        ("use_rslora", True, "rslora"),
        ("lora_target", "all", "auto"),
        ("lora_target", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("lora_target_modules", r".*\.q_proj", r".*\.q_proj"),
        ("max_steps", -1, None),
        ("max_grad_norm", 0, None),
        ("warmup_steps", 100, 100),
        ("train_on_inputs", True, False),
        ("val_set_size", 0.1, 0.1),
    ],
)
def test_values_are_converted(load: Load, name: str, value: Any, ours: Any) -> None:
    found: Any = load(**{name: value})
    for part in BY_NAME[name].key.split("."):
        found = getattr(found, part)
    assert found == ours


def test_what_cannot_be_translated_is_reported_with_the_rest(load: Load) -> None:
    text = problems(load, optim="lion_8bit", val_set_size=2000, warmup_steps=0.1, bf16="yes", nonsense=1, lora_r=0)
    for line in (
        "optim: given 'lion_8bit', for training.optimizer: there is none like it here; expected one of adamw",
        "val_set_size: given 2000, for data.val_ratio: a number of rows; give the share",
        "warmup_steps: given 0.1, for training.warmup_steps: a share of the steps",
        "bf16: given 'yes', for training.precision: expected true or false",
        "nonsense: unknown key",
        "peft.r: given 0",
    ):
        assert line in text
    assert text.count("\n") == 5


def test_names_that_disagree_are_a_problem_and_names_that_agree_are_not(load: Load) -> None:
    two = problems(load, learning_rate=1e-4, lr=1e-3)
    assert two == "training.lr: learning_rate (0.0001) and lr (0.001) say different things; keep one"
    assert "peft.r: lora_r (8) and peft.r (4) say" in problems(load, lora_r=8, peft={"r": 4})
    assert "training.precision: bf16 ('bf16') and fp16 ('fp16')" in problems(load, bf16=True, fp16=True)
    assert load(learning_rate=1e-4, lr=1e-4, training={"lr": 1e-4}, bf16=True, fp16=False).training.lr == 1e-4


def test_flat_and_nested_keys_mix_and_overrides_win(load: Load) -> None:
    config = load("training.lr=0.5", learning_rate=1e-4, training={"epochs": 7}, peft=None)
    assert (config.training.lr, config.training.epochs) == (0.5, 7)


def test_the_translation_is_logged_in_one_line(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    from training_lens.utils.logging import get_logger

    logger = get_logger("training_lens")
    logger.addHandler(caplog.handler)
    logger.setLevel("INFO")
    load(learning_rate=1e-4, optim="adamw_torch", fp16=False)
    logger.removeHandler(caplog.handler)
    wanted = "training_config.json: learning_rate -> training.lr, optim -> training.optimizer=adamw"
    assert set(caplog.messages) == {wanted}
