"""A config in Python: every problem as our own error, and what is refused changes nothing."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from training_lens.config.compose import validate_values
from training_lens.config.data_sections import DataSection
from training_lens.config.schema import ModelSection, TrainingConfig, TrainingSection
from training_lens.errors import ConfigurationError

BROKEN: list[dict[str, Any]] = [
    {"training": {"lr": -1, "epoch": 3}, "peft": {"r": 0}},
    {"training": {"eval_steps": 5}, "data": {"train": "a.json"}, "peft": {"r": "x"}},
    {"training": None},
    {"data": {"domain": {"field": "a", "per_file": True}, "val_ratio": 2}},
    {"data": {"train": [{"a": 1}, "b.json"]}},
    {"inference": {"adapter": None}},
    {"trainig": {}},
]


def problems_of(make: Callable[[], Any]) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        make()
    shown = None if caught.value.__suppress_context__ else caught.value.__context__
    assert shown is None  # pydantic's lines, which may show a secret, do not come with it
    return list(caught.value.problems)


@pytest.mark.parametrize("values", BROKEN)
def test_python_and_the_command_line_say_the_same(values: dict[str, Any]) -> None:
    typed = problems_of(lambda: validate_values(values))
    assert (
        typed
        == problems_of(lambda: TrainingConfig(**values))
        == problems_of(lambda: TrainingConfig.model_validate(values))
    )


def test_a_section_by_itself_names_its_keys() -> None:
    found = problems_of(lambda: TrainingSection(lr=0, epoch=1, seed="x"))
    assert [line.split(":")[0] for line in found] == ["lr", "seed", "epoch"]
    assert "did you mean 'epochs'?" in found[2]


def test_names_of_other_trainers_are_translated_as_in_a_file(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="training_lens"):
        config = TrainingConfig(learning_rate=1e-3, load_in_4bit=True, **{"peft.r": 4, "data.fields.output": "reply"})
    assert (config.training.lr, config.model.quantization, config.peft.r) == (1e-3, "4bit", 4)
    assert config.data.fields.output == "reply" and "learning_rate -> training.lr" in caplog.text
    found = problems_of(lambda: TrainingConfig(val_size=100, learning_rate=-1, peft={"r": 0}))
    assert [line.split(":")[0] for line in found] == ["val_size", "peft.r", "training.lr"]


def test_unknown_sections_are_named_by_their_keys() -> None:
    found = problems_of(lambda: TrainingConfig(lora={"r": 8, "alpha": 16}, peft={"lora_r": 8}))
    assert found == [
        "peft.lora_r: unknown key; did you mean 'peft.r'?",
        "lora.r: unknown key; did you mean 'peft.r'?",
        "lora.alpha: unknown key; did you mean 'peft.lora_alpha'?",
    ]


def test_a_table_may_come_under_another_trainers_name() -> None:
    pandas = pytest.importorskip("pandas")
    config = TrainingConfig(train_file=pandas.DataFrame([{"question": "a", "answer": "b"}]))
    assert config.data.train == [{"question": "a", "answer": "b"}]


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("training.lr", -1.0, "training.lr: given -1.0"),
        ("training.epoch", 3, "training.epoch: unknown key; did you mean 'training.epochs'?"),
        ("training.eval_steps", 5, "training.eval_steps: needs validation data"),
        ("training.scheduler_cycles", 2, "training.scheduler_cycles: 2 cycles need"),
        ("data.domain.field", "topic", "both say where the domain comes from"),
        ("data.weights", [1.0, 2.0], "data.weights: 2 weights for 1 entries"),
        ("output.mirror", "s3://me:password-9@bucket", "output.mirror: this looks like a secret"),
        ("training", {"lr": 2}, "training.lr: given 2, expected at most 1"),
        ("training", TrainingSection(eval_steps=5), "training.eval_steps: needs validation data"),
        ("model", ModelSection(quantization="4bit"), "peft.init: pissa needs the weights unquantized"),
        ("peft", None, "peft: given None, but it is a section"),
        ("tracking.hub.repo", 5, "tracking.hub.repo: given 5"),
    ],
)
def test_a_refused_assignment_changes_nothing(path: str, value: Any, problem: str) -> None:
    config = TrainingConfig(data={"train": ["a.json"], "domain": {"per_file": True}}, peft={"init": "pissa"})
    *sections, name = path.split(".")
    section: Any = config
    for part in sections:
        section = getattr(section, part)
    before, given = config.model_dump(), config.explicit_values()
    found = problems_of(lambda: setattr(section, name, value))
    assert problem in found[0] and "password-9" not in found[0]
    assert (config.model_dump(), config.explicit_values()) == (before, given)


def test_an_assignment_that_is_sound_is_kept_in_every_order() -> None:
    config = TrainingConfig(data={"train": ["a.json"]})
    config.data.val_ratio = 0.1
    config.training.eval_steps = 5
    assert "needs validation data" in problems_of(lambda: setattr(config.data, "val_ratio", 0.0))[0]
    config.training = TrainingSection(lr=1e-3)
    config.data = DataSection(train=["b.json"])
    assert "needs validation data" in problems_of(lambda: setattr(config.training, "eval_steps", 5))[0]


def test_a_section_belongs_to_one_config() -> None:
    section = TrainingSection(lr=1e-3)
    one, two = TrainingConfig(training=section), TrainingConfig(training=section, data={"val_ratio": 0.1})
    two.training.eval_steps = 5
    assert one.training.eval_steps is None and one.training.lr == two.training.lr == 1e-3


def test_configs_copy_compare_and_pickle_as_values() -> None:
    config = TrainingConfig(training={"lr": 1e-3})
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace_keys()):  # noqa: S301
        assert same == config and same.explicit_values() == config.explicit_values()
    assert config.training == TrainingSection(lr=1e-3)
