"""analyze, report and export on runs of ours and on PEFT checkpoints: what they print, write and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from slow_cases import slow_but

from training_lens.runs.run_folder import RunFolder, runs_folder

Call = Callable[..., Result]
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def run(embedded_run: RunFolder, tmp_path: Path) -> Path:
    """A copy of a finished run with captures, in the folder where the command looks for it."""
    run = runs_folder("outputs", "default") / "20260101T000000Z-aaaa"
    shutil.copytree(embedded_run.root, tmp_path / run)
    return tmp_path / run


@pytest.fixture
def adapter(run: Path) -> Path:
    """A PEFT folder, as another trainer leaves it."""
    return Path(shutil.copytree(run / "artifacts/adapter", run.parent.parent / "adapter"))


def printed(result: Result) -> dict[str, Any]:
    """The one object on standard output; NaN and infinity are no JSON."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    found: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return found


def refused(result: Result, code: int = 1) -> str:
    """The one paragraph of an error."""
    _, found, error = result.stderr.partition("error: ")  # before it may stand which run answers
    assert result.exit_code == code and found and "Traceback" not in error, result.output
    return error


def norm_of_update(adapter: Path, module: str) -> float:
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
    config = json.loads((adapter / "adapter_config.json").read_text())
    return float(torch.linalg.matrix_norm(b @ a)) * config["lora_alpha"] / config["r"]


def test_analyze_tells_the_update_that_is_in_the_adapter(call: Call, run: Path) -> None:
    told = printed(call("analyze", "--json"))  # the latest
    weights = told["results"]["weights"]
    assert told["run"] == run.name and told["status"] == "finished" and told["findings"]
    assert sum(weights["share_by_layer"].values()) == pytest.approx(1)
    for row in weights["modules"]:
        assert row["norm_update"] == pytest.approx(norm_of_update(run / "artifacts/adapter", row["module"]), rel=1e-5)


def test_analyze_explains_what_it_prints(call: Call, run: Path) -> None:
    text = call("analyze", str(run)).stdout
    assert "share of the update" in text and "dW is what the adapter adds to a weight W" in text
    assert "findings" in text


@pytest.mark.slow
def test_two_runs_are_looked_for_in_one_place(call: Call, run: Path) -> None:
    shutil.copytree(run, run.parent / "20260102T000000Z-bbbb")
    shutil.move("outputs", "elsewhere")
    told = printed(call("analyze", "output.base_output_dir=elsewhere", "--against", run.name, "--json"))
    assert told["run"] == "20260102T000000Z-bbbb" and told["against"]["median_cosine"] == pytest.approx(1)
    text = call("analyze", run.name, "output.base_output_dir=elsewhere", "--against", "latest").stdout
    assert "1.000" in text and "0°" in text


def test_a_second_run_that_is_not_there_is_told_before_anything_else(call: Call, run: Path) -> None:
    result = call("analyze", str(run), "--against", "./nowhere")
    assert "no run './nowhere'" in refused(result) and not result.stdout


def test_rank_needs_a_run_of_ours_that_is_finished(call: Call, run: Path, adapter: Path) -> None:
    assert "no run" in refused(call("rank", str(adapter)))
    assert "--write and --keep go together" in refused(call("rank", str(run), "--write", "small"), 2)
    (run / "taken").mkdir()
    (run / "taken/file").write_text("")
    taken = call("rank", str(run), "--write", str(run / "taken"), "--keep", "90%")
    assert "something is there already" in refused(taken, 2)
    shutil.rmtree(run / "artifacts")
    assert "has no finished adapter" in refused(call("rank", str(run)))


def test_tests_are_of_runs_of_ours_and_say_what_they_take(call: Call, run: Path, adapter: Path) -> None:
    assert "is none. Leave it out" in refused(call("analyze", str(adapter), "--test", "rate"))
    assert "give --test, too" in refused(call("analyze", str(run), "--test-steps", "5"), 2)
    for wrong in (["--test=rates"], ["--test", "rates"]):
        assert "--test: 'rates' is none of" in refused(call("analyze", str(run), *wrong), 2)


@pytest.mark.parametrize(
    ("format", "suffix"), slow_but([("md", "md")], [("html", "html"), ("md", "md"), ("json", "json")])
)
def test_report_writes_one_file(call: Call, run: Path, format: str, suffix: str) -> None:
    told = printed(call("report", str(run), "--kind", "executive", "--format", format, "--json"))
    report = Path(told["report"])
    assert report.parent == run / "reports" and report.suffix == f".{suffix}" and run.name in report.read_text()


@pytest.mark.slow
def test_report_of_two_runs_goes_where_it_is_told(call: Call, run: Path) -> None:
    told = printed(call("report", str(run), "--against", run.name, "--format", "md", "--output", "there", "--json"))
    assert Path(told["report"]).parent == Path("there") and Path(told["report"]).is_file()


@pytest.mark.parametrize(
    "kind",
    ["adapter_weights", "adapter_gradients", "lora_activations", "activations", "optimizer_state", "loss"],
)
def test_export_writes_each_kind_that_a_run_has(call: Call, run: Path, kind: str) -> None:
    told = printed(call("export", str(run), "--data-type", kind, "--output", "there", "--json"))
    assert told["files"] and all(Path(file).is_file() and rows > 0 for file, rows in told["files"].items())


def test_export_writes_over_a_file_only_by_force(call: Call, run: Path) -> None:
    arguments = ("export", str(run), "--data-type", "loss")
    assert call(*arguments).exit_code == 0 and (run / "exports/loss.csv").is_file()
    assert "exists already. Give --force" in refused(call(*arguments))
    assert call(*arguments, "--force").exit_code == 0


def test_a_foreign_adapter_is_read_with_the_base_that_fits(call: Call, adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "none/such"}))
    rows = printed(call("analyze", str(adapter), "--json"))["results"]["weights"]["modules"]
    assert all(row["norm_update"] > 0 and row["strength"] is None for row in rows)
    (tmp_path / "empty").mkdir()
    assert "is neither a folder nor a model id" in refused(call("analyze", str(adapter), "--base", "no-such-model"))
    assert "--base: no folder './nowhere'" in refused(call("analyze", str(adapter), "--base", "./nowhere"), 2)
    assert "holds no config.json" in refused(call("analyze", str(adapter), "--base", "empty"), 2)
    base = printed(call("analyze", str(adapter), "--base", "embedded", "--json"))["results"]["weights"]["modules"]
    assert all(row["strength"] > 0 for row in base)
    assert "no adapter_gradients were captured" in refused(
        call("export", str(adapter), "--data-type", "adapter_gradients")
    )


def test_a_snapshot_of_another_shape_is_named(call: Call, run: Path) -> None:
    path = min((run / "lens/adapters").glob("*.safetensors"))
    tensors = load_file(path)
    save_file({**tensors, f"{MODULE}.a": tensors[f"{MODULE}.a"][:1].clone()}, path)
    said = refused(call("analyze", str(run)))
    assert f"is not of this run: A and B of {MODULE}" in said and "step 1" in said


def test_a_damaged_segment_costs_its_steps_alone(call: Call, run: Path) -> None:
    path = max((run / "lens/adapter_gradients").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-50])
    result = call("analyze", str(run), "--json")
    assert printed(result)["results"]["weights"]["step"] and f"{path.name} is damaged" in result.stderr.replace(
        "\n", ""
    )


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("20260101T000000Z-aaab", "Did you mean '20260101T000000Z-aaaa'?"),
        ("./outputz", "Did you mean 'outputs'?"),
        ("outputs/experiments/default", "contains 1 run."),
        ("empty", "is empty"),
        ("file.txt", "is a file"),
        ("full", "is a full model"),
    ],
)
def test_what_is_no_run_is_told(call: Call, run: Path, tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.safetensors").touch()
    (tmp_path / "file.txt").touch()
    for command in (("analyze",), ("report",), ("export", "--data-type", "loss")):
        assert said in refused(call(*command, place))


def test_settings_that_reading_does_not_heed_are_wrong_usage(call: Call, run: Path) -> None:
    assert "training.lr=1: this reads what was captured" in refused(call("analyze", "training.lr=1"), 2)
    assert call("export", "--data-type", "gradients").exit_code == 2
    assert call("report", "--format", "pdf").exit_code == 2
