# ruff: noqa: E501 (a line a case reads best)
"""Files, own presets and files of other trainers: what each sets, which goes over which, and what is said."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from training_lens.config.compose import compose
from training_lens.config.foreign_keys import BY_NAME
from training_lens.config.ignored_keys import ORIGINS
from training_lens.errors import ConfigurationError
from training_lens.utils.logging import TrainingLogger, setup_logging
from training_lens.utils.nested import flatten_sections


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


# As people have them, from the trainers' own keys: what of it must be said here, and what comes of it.
FILES = {
    "llama-factory": (
        """
        model_name_or_path: m
        trust_remote_code: true
        stage: sft
        do_train: true
        finetuning_type: lora
        lora_target: all
        lora_rank: 8
        additional_target: embed_tokens,lm_head
        dataset: identity,alpaca_en_demo
        template: llama3
        cutoff_len: 2048
        max_samples: 1000
        mask_history: true
        overwrite_cache: true
        preprocessing_num_workers: 16
        image_max_pixels: 262144
        freeze_vision_tower: true
        output_dir: saves
        logging_steps: 10
        plot_loss: true
        report_to: none
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 8
        learning_rate: 1.0e-4
        num_train_epochs: 3.0
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        bf16: true
        early_stopping_steps: 3
        val_size: 0.1
        ddp_timeout: 180000000
        resume_from_checkpoint: null
        deepspeed: ds_z2_config.json
        """,
        ("data.train=rows.jsonl", "data.template=auto"),
        {"peft.modules_to_save": ["embed_tokens", "lm_head"], "data.supervise": "last",
         "training.early_stopping_patience": 3, "peft.target_modules": "auto", "training.precision": "bf16"},
        "no weights are sharded here",
    ),
    "hf": (
        """
        model_name_or_path: m
        dtype: bfloat16
        dataset_name: rows
        max_length: 2048
        packing: true
        completion_only_loss: true
        truncation_mode: keep_end
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 8
        learning_rate: 1e-4
        num_train_epochs: 3
        warmup_steps: 20
        lr_scheduler_type: constant_with_warmup
        optim: adamw_torch_fused
        activation_checkpointing: true
        activation_checkpointing_kwargs: {use_reentrant: false}
        bf16: true
        use_peft: true
        lora_r: 8
        lora_target_modules: all-linear
        lora_modules_to_save: [lm_head]
        eval_strategy: steps
        eval_steps: 50
        save_total_limit: 2
        dataset_num_proc: 4
        dataloader_num_workers: 2
        dataloader_drop_last: false
        report_to: [wandb]
        push_to_hub: false
        seed: 3
        """,
        ("data.train=rows.jsonl", "data.val_ratio=0.1"),
        {"data.mask_prompt": True, "data.truncation": "keep_end", "training.gradient_checkpointing": True,
         "training.scheduler": "constant", "training.warmup_steps": 20, "training.optimizer": "adamw"},
        "packing: there a step takes batch_size rows of packed examples",
    ),
    "axolotl": (
        """
        base_model: m
        model_type: AutoModelForCausalLM
        load_in_8bit: false
        load_in_4bit: true
        strict: false
        datasets:
          - path: rows
            type: alpaca
        dataset_prepared_path:
        val_set_size: 0.05
        output_dir: ./outputs/out
        adapter: qlora
        lora_model_dir:
        sequence_len: 2048
        excess_length_strategy: drop
        sample_packing: true
        pad_to_sequence_len: true
        lora_r: 8
        lora_alpha: 16
        lora_dropout: 0.05
        lora_target_linear: true
        wandb_project:
        wandb_watch:
        gradient_accumulation_steps: 8
        micro_batch_size: 1
        num_epochs: 3
        optimizer: paged_adamw_8bit
        lr_scheduler: cosine
        cosine_min_lr_ratio: 0.1
        learning_rate: 0.0001
        bf16: auto
        fp16:
        tf32: false
        gradient_checkpointing: offload
        early_stopping_patience:
        resume_from_checkpoint:
        flash_attention: true
        warmup_ratio: 0.1
        evals_per_epoch: 4
        saves_per_epoch: 1
        weight_decay: 0.0
        special_tokens:
          pad_token: "<|end_of_text|>"
        """,
        ("data.train=rows.jsonl",),
        {"model.quantization": "4bit", "data.truncation": "drop", "training.min_lr_ratio": 0.1,
         "training.gradient_checkpointing": True, "data.val_ratio": 0.05, "peft.from_adapter": None},
        "sample_packing: there a step takes batch_size rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("origin", FILES)
def test_a_file_of_another_trainer_trains_once_its_own_names_are_answered(
    origin: str, caplog: pytest.LogCaptureFixture, said: list[str]
) -> None:
    text, answers, wanted, note = FILES[origin]
    file = write("sft.yaml", textwrap.dedent(text))
    for left_out in answers:
        if not left_out.startswith("data.val_ratio"):
            key = left_out.partition("=")[0]
            assert f"; set {key}" in problem(file, [word for word in answers if word != left_out], None, origin)
    config = compose(file, answers, None, origin)
    values = flatten_sections(config.model_dump())
    common = {"model.id": "m", "model.seq_len": 2048, "peft.r": 8, "training.lr": 1e-4, "training.epochs": 3,
              "training.batch_size": 1, "training.gradient_accumulation_steps": 8, "data.train": ["rows.jsonl"]}  # fmt: skip
    expected = common | wanted
    assert {key: values[key] for key in expected} == expected
    assert note in "\n".join(caplog.messages)
    assert "of another trainer; --from" in problem(file)


def list_fields(place: str, name: str) -> set[str]:
    """The fields of a dataclass in an installed package, read without importing it."""
    package, _, path = place.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin
    tree = ast.parse((Path(spec.origin).parent / path).read_text())
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        part.target.id for part in found.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("transformers/training_args.py", "TrainingArguments"),
        ("transformers/training_args_seq2seq.py", "Seq2SeqTrainingArguments"),
        ("trl/trainer/sft_config.py", "SFTConfig"),
        ("trl/trainer/model_config.py", "ModelConfig"),
        ("trl/scripts/utils.py", "ScriptArguments"),
    ],
)
def test_every_key_of_the_hugging_face_trainers_is_known(place: str, name: str) -> None:
    keys = {key for key in list_fields(place, name) if key not in BY_NAME and not ORIGINS["hf"].has_key(key)}
    assert not keys


@pytest.mark.parametrize(
    ("origin", "name", "value", "message"),
    [
        ("axolotl", "batch_size", 64, "the examples of a whole step there"),
        ("llama-factory", "max_length", 64, "the longest generation there"),
        ("llama-factory", "freeze_vision_tower", False, "expected True or None"),
        ("llama-factory", "adapter_folder", "a", "expected None"),
        ("hf", "assistant_only_loss", False, "give data.mask_prompt"),
        ("axolotl", "special_tokens", {"eos_token": "x"}, "It would change the result"),
    ],
)
def test_a_key_that_means_something_else_there_is_refused(origin: str, name: str, value: Any, message: str) -> None:
    assert message in problem(write("a.yaml", {name: value}), (), None, origin)


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
