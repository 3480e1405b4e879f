# ruff: noqa: RUF001 (file names as people have them)
"""Whatever a shell passes behind a key arrives as it was typed: text as text, numbers as numbers, lists as lists."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from training_lens.config.compose import compose
from training_lens.config.keys import known_keys, nearest_key
from training_lens.config.overrides import key_type, split_list
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError

NASTY = [
    "rows (1).jsonl", "rows [final].jsonl", "[draft] rows.jsonl", "[a] and [b]", "großer Satz – ü.jsonl", "a=b.jsonl",
    "cost $5 ${x} $(y).jsonl", "a, b & c.jsonl", "it's \"here\".jsonl", "it's.jsonl", "100%#1.jsonl", "{a}: b.jsonl",
    "back\\slash\\n.jsonl", "日本語 データ.jsonl", "~backup.jsonl", "-rows.jsonl", "a;b|c!d?e*.jsonl", "  padded ",
    "'", "\"", "[", "]", "a]", "2024", "1e-3", "007", "true", "off", "1,5", "new\nline", "C:\\data\\rows.jsonl", "@x",
]  # fmt: skip


def look_up(config: Any, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def value_of(key: str, *overrides: str) -> Any:
    return look_up(compose(None, overrides), key)


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        compose(None, overrides)
    return str(caught.value)


@pytest.mark.parametrize("text", NASTY)
def test_text_is_taken_as_it_was_typed(text: str) -> None:
    keys = ["tracking.wandb.name", "data.fields.instruction", "model.id", "output.base_output_dir"]
    keys += [] if "," in text else ["peft.target_modules"]
    config = compose(None, [f"{key}={text}" for key in (*keys, "data.train")])
    assert [look_up(config, key) for key in keys] == [text] * len(keys) and config.data.train == [text]


@pytest.mark.parametrize("name", ["[draft].jsonl", "[a,b]", "null", "'quoted'", "a,b", "~"])
def test_a_file_of_that_very_name_wins(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    assert value_of("data.train", f"data.train={name}") == [name]
    assert value_of("model.id", f"model.id={name}") == name


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("[a.json,b.json]", ["a.json", "b.json"]),
        ("[ rows (1).jsonl , großer Satz.jsonl ]", ["rows (1).jsonl", "großer Satz.jsonl"]),
        ("['a,b.json',\"c d\"]", ["a,b.json", "c d"]),
        ("[it's.json,b]", ["it's.json", "b"]),
        ("[rows [1].json,b]", ["rows [1].json", "b"]),
        ("[2024,1.50,true,null]", ["2024", "1.50", "true", "null"]),
        ("[one.json]", ["one.json"]),
        ("'[a,b]'", ["[a,b]"]),
        ("[{question: a, answer: b}]", [{"question": "a", "answer": "b"}]),
        ("[${HOME}/a.json]", ["${HOME}/a.json"]),
        (r"['C:\a,b\\',c]", ["C:\\a,b\\", "c"]),
    ],
)
def test_lists_of_texts(typed: str, meant: list[Any]) -> None:
    assert value_of("data.train", f"data.train={typed}") == meant


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("output.experiment_name=2024", "2024"),
        ("model.id=123", "123"),
        ("output.run_id=1e5", "1e5"),
        ("peft.from_adapter=null", None),
        ("peft.from_adapter='null'", "null"),
        ("output.mirror=NULL", None),
        ("tracking.wandb.name='a b'", "a b"),
        ("tracking.wandb.tags=[a b,2024]", ["a b", "2024"]),
        ("training.lr=1e-3", 1e-3),
        ("++training.epochs=3", 3.0),
        ("training.max_steps=null", None),
        ("training.gradient_checkpointing=true", True),
        ("training.micro_batch_tokens=auto", "auto"),
        ("peft.rank_pattern={q_proj: 8}", {"q_proj": 8}),
        ("peft.rank_pattern.q_proj=8", {"q_proj": 8}),
        ('peft.rank_pattern={"layers.0.q_proj": 8}', {"layers.0.q_proj": 8}),
        ("peft.target_modules=[q_proj,v_proj]", ["q_proj", "v_proj"]),
        (r"peft.target_modules=.*layers\.[0-3]\.(q|v)_proj{1,2}", r".*layers\.[0-3]\.(q|v)_proj{1,2}"),
        ("data.template=Q: {instruction}\\nA: {output}", "Q: {instruction}\\nA: {output}"),
        ("prepare.splits={train: 0.8, test: 0.2}", {"train": 0.8, "test": 0.2}),
    ],
)
def test_each_kind_of_key_reads_what_is_meant(override: str, meant: Any) -> None:
    key = override.lstrip("+").split("=")[0].removesuffix(".q_proj")
    assert value_of(key, override) == meant


def test_the_home_folder_is_named_by_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert value_of("data.train", "data.train=[~/a.json,b]") == [f"{tmp_path}/a.json", "b"]
    assert value_of("model.id", "model.id=~/model") == f"{tmp_path}/model"
    assert TrainingConfig.model_validate({"data": {"train": "~/a.json"}}).data.train == [f"{tmp_path}/a.json"]
    for key in known_keys(TrainingConfig):  # whatever names a file or folder
        if key.endswith(("folder", "_dir", "path", "prepare.output", "adapter", "mirror")):
            assert key_type(key).is_path, key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.lr", "1e-3"], "'training.lr 1e-3' is no override; write key=value. Did you mean training.lr=1e-3?"),
        (["--training.lr=1e-3"], "Did you mean training.lr=1e-3?"),
        (["--learning_rate", "2e-4"], "Did you mean training.lr=2e-4?"),
        (["lr", "5"], "Did you mean training.lr="),
        (["lr=1e-3"], "lr: unknown key; did you mean 'training.lr'?"),
        (["training.lr:", "5"], "Did you mean training.lr=5?"),
        (["rows.jsonl"], "'rows.jsonl' is no override; write key=value; for rows to train on: data.train=rows.jsonl"),
        (["my.yaml"], "for a config file: --config my.yaml"),
        (["model"], "for a model: model.id=model"),
        (["What is 2+2=?"], "is no override; write key=value, for example"),
        (["~training.lr"], "sweeps and deletions have no place here"),
        (["data.train=a.json,b.json"], "give one value, lists as data.train=[a.json,b.json]"),
        (["peft.target_modules=q_proj,v_proj"], "lists as peft.target_modules=[q_proj,v_proj]"),
        (["data.train=\udcff.jsonl"], "data.train: the value is not UTF-8 text"),
        (["training.lr=abc"], "training.lr: given 'abc'"),
        (["training.lr=$LR"], "training.lr: given '$LR'"),
        (["training.lr", "peft.r"], "2 problems"),
    ],
)
def test_what_is_no_override_says_what_was_meant(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "my.yaml", "a.json", "b.json"):
        Path(name).touch()
    Path("model").mkdir()
    Path("model/config.json").touch()
    assert message in problem(*words)


def test_the_last_of_two_values_holds_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "training_lens"):
        from training_lens.utils.logging import get_logger

        get_logger("training_lens").addHandler(caplog.handler)
        assert value_of("training.lr", "training.lr=1", "training.lr=0.5") == 0.5
        get_logger("training_lens").removeHandler(caplog.handler)
    assert "training.lr is given more than once; the last one holds: training.lr=0.5" in caplog.messages


def test_every_key_of_the_schema_has_a_form() -> None:
    forms = {key: key_type(key).form for key in known_keys(TrainingConfig)}
    assert {forms[key] for key in ("model.id", "peft.variant", "output.experiment_name")} == {"text"}
    assert {forms[key] for key in ("data.train", "peft.target_modules", "benchmark.models")} == {"texts"}
    assert {forms[key] for key in ("training.lr", "peft.rank_pattern", "data.weights", "sweep.space")} == {"other"}


@pytest.mark.parametrize("text", ["", "[", "]", "[a", "a]", "[a]b", "[a],[b]", "[[a]", "[a]]"])
def test_what_is_no_list_is_none(text: str) -> None:
    assert split_list(text) is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("rank", "peft.r"),
        ("lerning_rate", "training.lr"),
        ("patience", "training.early_stopping_patience"),
        ("peft.rr", "peft.r"),
        ("evaluation.metric", "evaluation.metrics"),
        ("model", "model.id"),
        ("wandb", "tracking.wandb.mode"),
        *((word, None) for word in ("test", "user", "bias", "cache", "dataset", "penalty", "data.test", "num_workers")),
    ],
)
def test_what_was_meant_is_suggested_and_nothing_absurd(typed: str, meant: str | None) -> None:
    assert nearest_key(typed, known_keys(TrainingConfig)) == meant
