"""`validate` shows what train would do, trains nothing that is kept, and exits with 0 only if train would start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from training_lens.cli import cli

ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}.", "domain": "ab"[i % 2]} for i in range(30)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    extra = [ROWS[0], {"question": "Say <|end|>", "answer": "Yes.<|endoftext|>", "domain": "a"}]
    lines = [json.dumps(row) + "\n" for row in [*ROWS, *extra]]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    held = [ROWS[1], {"question": "Where is the cat?", "answer": "In the yard.", "domain": "b"}]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return tmp_path


def test_everything_is_shown_and_no_run_is_made(folder: Path) -> None:
    result = CliRunner().invoke(cli, ["validate", "data.train=train.jsonl", "data.validation=held.jsonl"])
    said = " ".join(result.output.split())
    assert result.exit_code == 0, said
    assert "«In the hall 0.<|end|>»" in said and "3 of the training examples" in said
    for part in ("domain a", "domain b", "question -> answer, domain from domain", "total steps", "peak memory"):
        assert part in said, said
    assert "1 of 2 validation rows (50.0%): 1 equal but for white space. Such as held.jsonl:1 and train.jsonl:2" in said
    assert "32 rows are 31 different ones" in said and "train.jsonl:31 repeats train.jsonl:1" in said
    assert "names of special tokens in the rows" in said and "'<|end|>' (1)" in said
    assert "literal end marks taken off" in said and "'<|endoftext|>' (1)" in said
    assert not (folder / "outputs/experiments").exists()


@pytest.mark.slow
def test_json_has_the_same_and_train_agrees(folder: Path) -> None:
    settings = ["data.train=train.jsonl", "data.validation=held.jsonl", "training.epochs=1"]
    result = CliRunner().invoke(cli, ["validate", *settings, "--json"])
    report = json.loads(result.stdout)
    assert report["train_examples"] == 32 and report["domains"] == ["a", "b"]
    assert (report["repeated_train_examples"], report["validation_examples_in_train"]) == (1, 1)
    found = {finding["code"]: finding for finding in report["findings"]}
    assert found["leaks"]["severity"] == "warning" and found["leaks"]["evidence"]["exact"] == 1
    assert report["splits"]["train"]["examples_by_file"] == {"train.jsonl": 32}
    parts = {
        "seconds",
        "seconds_low",
        "seconds_high",
        "validation_seconds",
        "peak_bytes",
        "micro_batch_tokens",
        "measured_steps",
        "layers",
        "others_share",
    }
    assert set(report["estimate"]) == parts and report["estimate"]["micro_batch_tokens"] == 4096
    summary = json.loads(CliRunner().invoke(cli, ["train", *settings, "tracking.tensorboard=false", "--json"]).stdout)
    assert summary["steps"] == report["total_steps"]
    kept = json.loads((Path(summary["run_dir"]) / "reports/preflight.json").read_text())["findings"]
    assert [f for f in kept if f["code"] != "base_model"] == report["findings"]


@pytest.mark.slow
def test_several_validation_files_are_reported_each(folder: Path) -> None:
    (folder / "more.jsonl").write_text(json.dumps({"question": "Who?", "answer": "Tom.", "domain": "a"}) + "\n")
    settings = ["data.train=train.jsonl", "data.validation=[held.jsonl,more.jsonl]", "training.max_steps=2"]
    settings += ["tracking.tensorboard=false"]
    result = CliRunner().invoke(cli, ["train", *settings, "--json"])
    run = Path(json.loads(result.stdout)["run_dir"])
    lines = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["kind"] in ("base", "validation")]
    assert validations and all(set(v["by_file"]) == {"held.jsonl", "more.jsonl"} for v in validations)
    for v in validations:
        assert min(v["by_file"].values()) <= v["loss"] <= max(v["by_file"].values())


@pytest.mark.slow
def test_weights_of_sources_decide_the_steps(folder: Path) -> None:
    settings = ["data.train=[train.jsonl,held.jsonl]", "data.weights=[0.5,4]", "training.batch_size=8", "--json"]
    report = json.loads(CliRunner().invoke(cli, ["validate", *settings]).stdout)
    assert report["examples_per_epoch"] == 16 + 8 and report["steps_per_epoch"] == 3
