"""What init writes is accepted by validate as it is, and init looks before it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from training_lens.config.compose import compose
from training_lens.config.schema import TrainingConfig

Call = Callable[..., Result]


@pytest.fixture
def rows(write_rows: Callable[..., Path]) -> str:
    rows = [{"question": f"Box {i}?", "answer": f"In {i}.", "topic": "hall"} for i in range(30)]
    return write_rows(rows).name


def test_the_file_is_the_defaults_and_validates(call: Call) -> None:
    written = call("init")
    assert written.exit_code == 0, written.stderr
    assert "training-lens validate --config config.yaml" in written.stdout
    assert compose("config.yaml") == TrainingConfig()
    assert call("validate", "--config", "config.yaml", "data.max_examples=32").exit_code == 0


@pytest.mark.slow
def test_options_are_set_and_looked_into(call: Call, rows: str) -> None:
    result = call("init", "mine.yml", "--train", rows, "--model", "embedded", "--json")
    assert json.loads(result.stdout)["values"] == {"model.id": "embedded", "data.train": [rows], "data.val_ratio": 0.1}
    assert "read as question -> answer" in result.stderr
    assert call("validate", "--config", "mine.yml").exit_code == 0
    assert call("init", "b.yml", "--train", rows, "--validation", rows).exit_code == 0
    assert (compose("b.yml").data.validation, compose("b.yml").data.val_ratio) == ([rows], 0.0)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["there.yaml"], 2, "there.yaml: is there already; give another name, or --force"),
        (["config.json"], 2, "init writes YAML"),
        (["no/config.yaml"], 2, "there is no folder 'no'"),
        (["a.yaml", "--train", "row.jsonl"], 1, "Did you mean 'rows.jsonl'?"),
        (["a.yaml", "--train", "odd.jsonl"], 1, "Or let init ask: training-lens init --ask --train odd.jsonl"),
        (["a.yaml", "--model", "./nowhere"], 1, "no folder './nowhere'"),
        (["a.yaml", "--train", "rows.jsonl", "--validation", "1.5"], 2, "data.val_ratio: given 1.5"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    call: Call, rows: str, arguments: list[str], code: int, message: str
) -> None:
    Path("there.yaml").write_text("mine\n")
    Path("odd.jsonl").write_text('{"a": "1", "b": "2"}\n')
    result = call("init", *arguments)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert not Path("a.yaml").exists() and Path("there.yaml").read_text() == "mine\n"


def test_force_writes_over(call: Call) -> None:
    Path("config.yaml").write_text("mine\n")
    assert call("init", "--force").exit_code == 0
    assert compose("config.yaml") == TrainingConfig()


def test_enter_takes_the_defaults(call: Call) -> None:
    result = call("init", "--ask", input="\n" * 5)
    assert result.exit_code == 0 and "embedded:train: read as" in result.stdout
    assert compose("config.yaml") == TrainingConfig()


def test_answers_are_checked_on_the_spot(call: Call, rows: str) -> None:
    typed = ["./nowhere", "embedded", "row.jsonl", rows, "2", "0.2", "topi", "topic", "a/b", "boxes"]
    result = call("init", "--ask", input="\n".join(typed) + "\n")
    assert result.exit_code == 0, result.stdout
    for message in ("no folder './nowhere'", "Did you mean 'rows.jsonl'", "read as question -> answer"):
        assert message in result.stdout
    for message in ("data.val_ratio: given 2.0", "Did you mean 'topic'?", "cannot name a folder"):
        assert message in result.stdout
    config = compose("config.yaml")
    assert (config.data.train, config.data.val_ratio, config.data.domain.field) == ([rows], 0.2, "topic")
    assert config.output.experiment_name == "boxes"


@pytest.mark.slow
def test_fields_that_are_not_found_are_asked_for(call: Call) -> None:
    Path("odd.jsonl").write_text('{"ask": "1", "say": "2"}\n{"ask": "3", "say": "4"}\n')
    result = call("init", "--ask", "--train", "odd.jsonl", input="\n\nask\nsay\n0.5\n\n\n")
    assert result.exit_code == 0, result.stdout
    assert "which field is the prompt (ask, say)" in result.stdout and "read as ask -> say" in result.stdout
    assert compose("config.yaml").data.fields.model_dump(exclude_none=True) == {
        "instruction": "ask",
        "output": "say",
    }
    assert call("validate", "--config", "config.yaml").exit_code == 0


def test_a_broken_row_asks_for_another_file_and_not_for_fields(call: Call, rows: str) -> None:
    Path("lacking.jsonl").write_text('{"question": "1"}\n{"question": "3", "answer": "4"}\n')
    result = call("init", "--ask", input=f"\nlacking.jsonl\n{rows}\n\n\n\n")
    assert result.exit_code == 0, result.stdout
    assert "lacking.jsonl, row 1: has no field 'answer'" in result.stdout and "which field" not in result.stdout
    assert compose("config.yaml").data.train == [rows]


def test_leaving_the_questions_writes_nothing(call: Call) -> None:
    assert call("init", "--ask", input="\n").exit_code == 1
    assert not Path("config.yaml").exists()
