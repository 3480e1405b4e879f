"""The search space: presets, the file and the command line in layers; what no trial could take is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_lens.config.compose import compose
from training_lens.config.schema import TrainingConfig
from training_lens.config.search_space import ChoiceDimension, RangeDimension, parse_space
from training_lens.errors import ConfigurationError


@pytest.mark.parametrize("name", ["lr", "rank", "full"])
def test_every_preset_is_a_sweep(name: str) -> None:
    config = compose(overrides=[f"sweep={name}", "sweep.trials=3"])
    assert (config.sweep.name, config.sweep.trials) == (name, 3)
    assert parse_space(config) and compose(overrides=[f"+sweep={name}"]).sweep.space == config.sweep.space


def test_a_later_layer_goes_over_a_key_and_keeps_the_others(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("sweep:\n  space:\n    peft:\n      r: [2, 3]\n    training.lr: {low: 1e-4}\n")
    space = parse_space(compose(str(file), ["sweep=lr", "sweep.space.peft.r=[5]", "sweep.space.training.lr.high=0.1"]))
    assert space == {"training.lr": RangeDimension(1e-4, 0.1, log=True), "peft.r": ChoiceDimension((5,))}


def test_choices_are_read_as_their_key_reads_them() -> None:
    overrides = ["sweep.space.training.lr=[1e-3,1]", "sweep.space.peft.target_modules=[auto,[q_proj,v_proj]]"]
    space = parse_space(compose(overrides=overrides))
    assert space == {
        "training.lr": ChoiceDimension((1e-3, 1.0)),
        "peft.target_modules": ChoiceDimension(("auto", ["q_proj", "v_proj"])),
    }


def test_a_range_of_whole_numbers_is_a_grid_and_one_with_a_step_too() -> None:
    assert RangeDimension(4, 64, whole=True).value_count == 61
    assert RangeDimension(0.0, 0.2, step=0.05).value_count == 5
    assert RangeDimension(1e-5, 1e-2, log=True).value_count is None


def test_a_key_that_takes_a_word_besides_numbers_has_a_range() -> None:
    space = parse_space(compose(overrides=["sweep.space.training.micro_batch_tokens={low: 256, high: 1024}"]))
    assert space == {"training.micro_batch_tokens": RangeDimension(256, 1024, whole=True)}


def test_a_whole_range_replaces_that_of_a_preset() -> None:
    space = parse_space(compose(overrides=["sweep=lr", "sweep.space.training.lr={low: 1e-3, high: 5e-3, step: 1e-3}"]))
    assert space == {"training.lr": RangeDimension(1e-3, 5e-3, step=1e-3)}


def test_problems_of_a_space_are_reported_with_all_others() -> None:
    with pytest.raises(ConfigurationError) as caught:
        compose(overrides=["sweep.space.peft.r=[0,4,4]", "sweep.space.peft.rr=[1]", "sweep.space.training.lr=[2]"])
    text = str(caught.value)
    assert "sweep.space.peft.r: given 0, expected at least 1" in text
    assert "sweep.space.peft.r: 4 is given twice" in text
    assert "sweep.space.peft.rr: unknown key; did you mean 'peft.r'?" in text
    assert "sweep.space.training.lr: given 2, expected at most 1" in text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("peft.r={low: 4}", "a range needs high"),
        ("peft.r={low: 4, hihg: 8}", "'hihg' is no part of a range, it has low, high, log, step. Did you mean 'high'?"),
        ("peft.r={low: 4, high: 8.5}", "high: given 8.5, expected a whole number"),
        ("peft.r={low: 0, high: 8}", "given 0, expected at least 1"),
        ("peft.r={low: 8, high: 4}", "low 8 is not below high 4"),
        ("training.lr={low: 0.1, high: high}", "high: given 'high', expected a number"),
        ("peft.lora_dropout={low: 0, high: 0.1, log: true}", "a range with log begins above 0"),
        ("peft.lora_dropout={low: 0, high: 0.1, step: 0.03}", "steps of 0.03 from low 0 miss high 0.1"),
        ("training.lr={low: 0.1, high: 0.2, log: true, step: 0.1}", "log and step are both given"),
        ("peft.variant={low: 1, high: 2}", "takes no numbers"),
        ("peft.r=[]", "give choices such as [4, 8]"),
        ("output.run_id=[a]", "no trial can differ in it"),
        ("sweep.trials=[1]", "no trial can differ in it"),
        ("data.template=[chat]", "losses on other tokens cannot be compared"),
    ],
)
def test_each_problem_says_what_to_do(spec: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        compose(overrides=[f"sweep.space.{spec}"])
    assert message in str(caught.value) and spec.split("=")[0] in str(caught.value)


def test_the_seed_is_no_dimension_where_it_draws_the_validation_rows() -> None:
    with pytest.raises(ConfigurationError, match="draws the validation rows"):
        compose(overrides=["data.val_ratio=0.1", "sweep.space.training.seed=[0,1]"])


def test_the_storage_with_its_password_is_never_saved() -> None:
    config = TrainingConfig.model_validate({"sweep": {"storage": "postgresql://me:secret@host/db"}})
    assert "secret" not in str(config.model_dump())
    assert config.replace_keys(training={"lr": 0.1}).sweep.storage == config.sweep.storage
