"""Presets, then the user's file, then overrides; every problem at once, with the nearest known key."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from training_lens.config.compose import compose
from training_lens.config.keys import known_keys
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError


def problems(*overrides: str, config_file: str | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        compose(config_file, overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


@pytest.mark.parametrize("name", ["default", "quick_test", "default-full", "dora", "qlora"])
def test_every_preset_composes(name: str) -> None:
    assert isinstance(compose(overrides=[f"+experiment={name}"]), TrainingConfig)


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("training:\n  epochs: 7\n  lr: 0.01\n")
    config = compose(str(file), ["+experiment=quick_test", "training.lr=1e-5"])
    assert (config.training.epochs, config.training.lr) == (7, 1e-5)
    assert config.data.max_examples == 160


def told(caplog: pytest.LogCaptureFixture, file: Path, *overrides: str) -> list[str]:
    """What composing logs."""
    logger = logging.getLogger("training_lens.config.compose")  # commands keep their log from the root's handlers
    caplog.clear()
    with caplog.at_level(logging.INFO, logger.name):
        logger.addHandler(caplog.handler)
        compose(str(file), overrides)
        logger.removeHandler(caplog.handler)
    return list(dict.fromkeys(caplog.messages))


def test_a_file_that_wins_over_a_named_preset_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("peft:\n  r: 16\n  lora_alpha: 128\ntraining.epochs: 2\noutput.experiment_name: mine\n")
    assert told(caplog, file, "+experiment=default-full", "inference=base") == [
        f"--config {file} sets peft.r, training.epochs over experiment=default-full"
    ]
    assert told(caplog, file, "+experiment=dora") == told(caplog, file) == []


def test_json_files_and_dotted_keys_are_read(tmp_path: Path) -> None:
    file = tmp_path / "my.json"
    file.write_text(json.dumps({"training.lr": 0.5, "data": {"train": "a.json"}}))
    config = compose(str(file))
    assert config.training.lr == 0.5
    assert config.data.train == ["a.json"]


def test_all_problems_are_reported_at_once() -> None:
    found = problems("training.lrr=3", "peft.r=0", "lr=1", "data.train=x.json", "training.eval_steps=2")
    assert len(found) == 4
    text = "\n".join(found)
    assert "training.lrr: unknown key; did you mean 'training.lr'?" in text
    assert "peft.r: given 0, expected at least 1" in text
    assert "lr: unknown key; did you mean 'training.lr'?" in text
    assert "training.eval_steps: needs validation data" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.sequence_len=8", "did you mean 'model.seq_len'"),
        (
            "+experiment=quick_tset",
            "no such preset; there are: default, default-full, dora, qlora, quick_test. Did you mean 'quick_test'",
        ),
        ("training.lr", "'training.lr' is no override; write key=value"),
        ("training.lr=1,2", "sweeps and deletions have no place here"),
        ("data.train=[]", "data.train: no rows and no paths"),
        ("training=5", "training: given 5"),
        ("output.run_id=../x", "cannot name a folder"),
        ("output.experiment_name=latest", "cannot name a folder"),
        ("training.lr=nan", "training.lr: given nan"),
        ("training.micro_batch_tokens=0", "training.micro_batch_tokens: given 0, expected at least 1 or 'auto'"),
        (
            "training.micro_batch_tokens=most",
            "training.micro_batch_tokens: given 'most', expected a whole number or 'auto'",
        ),
        ("peft.variant=lara", "peft.variant: given 'lara'"),
        (
            "tracking.mlflow=true",
            "tracking.mlflow: given True, but it is a section with the keys tracking.mlflow.enabled,",
        ),
    ],
)
def test_each_problem_says_what_to_do(override: str, message: str) -> None:
    assert message in "\n".join(problems(override))


def test_two_presets_of_one_group_are_refused() -> None:
    message = "+experiment=default +experiment=dora: two presets of experiment are given; give one"
    assert list(problems("+experiment=default", "+experiment=dora")) == [message]


def test_conflicts_across_keys_are_found() -> None:
    both = problems("data.train=a.json", "data.validation=b.json", "data.val_ratio=0.1")
    assert "data.validation and data.val_ratio are both given" in both[0]
    assert (
        "data.domain.field and data.domain.per_file" in problems("data.domain.field=x", "data.domain.per_file=true")[0]
    )
    patience = problems("data.train=a.json", "training.early_stopping_patience=2")
    assert "needs validation data" in patience[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.yaml", None, "cannot be read"),
        ("a.yaml", "training: [1,\n", "no valid YAML"),
        ("a.json", '{"a": \n', "line 2: no valid JSON"),
        ("a.yaml", "- 1\n", "holds a list"),
    ],
)
def test_broken_config_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    found = problems(config_file=str(tmp_path / name))
    assert message in found[0] and name in found[0]


def test_paths_may_be_text_or_path_objects() -> None:
    one = TrainingConfig.model_validate({"data": {"train": Path("a.json"), "validation": ["b.json", Path("c.json")]}})
    assert (one.data.train, one.data.validation) == (["a.json"], ["b.json", "c.json"])


def test_the_embedded_set_brings_its_held_out_rows() -> None:
    assert TrainingConfig().data.validation_sources == ["embedded:heldout"]
    assert compose(overrides=["data.train=mine.json"]).data.validation_sources == []


def test_every_key_is_described() -> None:
    keys = known_keys(TrainingConfig)
    assert {"model.id", "training.lr", "data.domain.style", "output.run_id"} <= set(keys)
    for section in TrainingConfig.model_fields.values():
        fields = section.annotation.model_fields.items()  # type: ignore[union-attr]
        undescribed = [
            name for name, field in fields if not field.description and not hasattr(field.annotation, "model_fields")
        ]
        assert not undescribed


def test_what_was_never_set_stays_unset() -> None:
    config = TrainingConfig()
    config.data.domain.style = "hash"
    later = config.replace_keys(training={"lr": 0.5})
    assert (later.training.lr, later.data.domain.style) == (0.5, "hash")
    assert later.training.model_fields_set == {"lr"} and not later.peft.model_fields_set
