"""The file that init writes is a config: as it is, and with every key uncommented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from training_lens.cli.init import LIVE, render_skeleton
from training_lens.config.compose import compose
from training_lens.config.keys import known_keys
from training_lens.config.schema import TrainingConfig


def uncommented(text: str) -> str:
    return re.sub(r"(?m)^( *)#(?=\S)", r"\1", text)


@pytest.mark.parametrize("every_key", [False, True], ids=["as it is", "every key"])
def test_it_is_the_defaults(tmp_path: Path, every_key: bool) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(uncommented(render_skeleton({})) if every_key else render_skeleton({}))
    assert compose(str(file)) == TrainingConfig()


def test_every_key_stands_in_it_and_the_main_ones_are_set() -> None:
    def keys(value: object, prefix: str = "") -> list[str]:
        if not isinstance(value, dict) or prefix in known_keys(TrainingConfig):
            return [prefix]
        return [key for name, inner in value.items() for key in keys(inner, f"{prefix}.{name}".lstrip("."))]

    assert keys(yaml.safe_load(uncommented(render_skeleton({})))) == known_keys(TrainingConfig)
    settings = [line for line in render_skeleton({}).splitlines() if re.match(r" *[a-z_]+: .", line)]
    assert len(settings) == len(LIVE)


@pytest.mark.parametrize("name", ["default", "quick_test", "default-full", "dora", "qlora"])
def test_every_preset_is_heeded_beside_it(tmp_path: Path, name: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(render_skeleton({}))
    assert compose(str(file), [f"+experiment={name}"]) == compose(None, [f"+experiment={name}"])


def test_given_values_are_set(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        render_skeleton({"model.id": "pläce/with 'quotes'", "data.domain.field": None, "data.train": ["a: b.json"]})
    )
    config = compose(str(file))
    assert (config.model.id, config.data.domain.field) == ("pläce/with 'quotes'", None)
    assert config.data.train == ["a: b.json"]


def test_lines_are_short() -> None:
    assert max(len(line) for line in render_skeleton({}).splitlines()) <= 120
