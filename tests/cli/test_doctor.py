"""`doctor` names what is damaged of a run, and makes anew, byte for byte, what can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from slow_cases import slow_but

from training_lens.core.capture_files import read_manifest
from training_lens.inference.session import open_run
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.integrity import read_sealed

Call = Callable[..., Result]


def checked(call: Call, *arguments: str) -> dict[str, Any]:
    result = call("doctor", *arguments, "--json")
    report = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == (0 if report["ok"] else 1)
    return {**report, "bad": [check["name"] for check in report["checks"] if not check["ok"]]}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_machine_is_looked_through(call: Call) -> None:
    report = checked(call)
    names = [check["name"] for check in report["checks"]]
    assert report["run"] is None and {"packages", "device", "runs", "C compiler", "optional packages"} <= set(names)
    assert call("doctor", "--repair").exit_code == 2


def test_a_sound_run_is_sound_and_its_whole_base_too(call: Call, own_run: RunFolder) -> None:
    report = checked(call, str(own_run.root), "--verify")
    assert report["ok"] and report["checks"][-1]["name"] == "whole base"
    assert set(read_sealed(own_run.base_record)["sha256"]) == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


@pytest.mark.slow
def test_captures_that_were_deleted_are_named_and_taken_as_lost(call: Call, own_run: RunFolder) -> None:
    segment, listing = next(own_run.lens.glob("loss/*.parquet")), own_run.lens / "files.json"
    segment.unlink()
    report = checked(call, str(own_run.root), "--repair")
    found = {check["name"]: check["found"] for check in report["checks"]}
    assert report["bad"] == ["captures"] and str(segment) in found["captures"]
    assert str(segment) in call("report", str(own_run.root), "--format", "md").output
    assert checked(call, str(own_run.root), "--accept")["ok"]
    flip(listing)
    assert checked(call, str(own_run.root))["bad"] == ["lens files", "captures"]
    assert checked(call, str(own_run.root), "--repair")["ok"]


@pytest.mark.parametrize("damage", slow_but([flip], [flip, Path.unlink]))
def test_what_can_be_made_anew_is_and_answers_as_before(call: Call, own_run: RunFolder, damage: Any) -> None:
    summary, lens = own_run.read_metadata("summary.json"), read_manifest(own_run.lens)
    files = {
        "adapter": own_run.adapter / "adapter_model.safetensors",
        "tokenizer": own_run.tokenizer / "tokenizer.json",
        "summary": own_run.metadata / "summary.json",
        "base": own_run.base_record,
        "lens": own_run.lens / "lens.json",
    }
    before = {name: path.read_bytes() for name, path in files.items()}
    for path in files.values():
        damage(path)
    assert set(files) <= set(checked(call, str(own_run.root))["bad"])
    assert checked(call, str(own_run.root), "--repair")["bad"] == []
    for name in ("adapter", "tokenizer", "base"):
        assert files[name].read_bytes() == before[name]
    again = own_run.read_metadata("summary.json")
    measured_then = {"peak_bytes", "estimate", "run_dir", "lens_seconds"}
    assert {k: v for k, v in again.items() if k not in measured_then} == {
        k: v for k, v in summary.items() if k not in measured_then
    }
    assert read_manifest(own_run.lens).modules == lens.modules and read_manifest(own_run.lens).tables == lens.tables
    assert open_run(own_run).has_adapter


def test_what_cannot_is_named_and_may_be_taken_as_it_is(call: Call, own_run: RunFolder) -> None:
    config = own_run.metadata / "config.json"
    config.write_text(config.read_text() + " ")
    report = checked(call, str(own_run.root), "--repair")
    assert report["bad"][0] == "metadata" and "--accept" in report["checks"][1]["remedy"]
    assert checked(call, str(own_run.root), "--accept")["ok"]
    assert open_run(own_run).has_adapter


@pytest.mark.slow
def test_a_damaged_token_cache_is_made_anew(call: Call, finished_run: RunFolder, tmp_path: Path) -> None:
    base, name = finished_run.root.parents[3], finished_run.read_metadata("data.json")["fingerprint"][:32]
    run = Path(
        shutil.copytree(finished_run.root, tmp_path / "elsewhere/experiments/default/runs" / finished_run.run_id)
    )
    cached = Path(shutil.copytree(base / "cache" / name, tmp_path / "elsewhere/cache" / name)) / "examples.arrow"
    content = cached.read_bytes()
    flip(cached)
    assert checked(call, str(run))["bad"] == ["token cache"]
    assert checked(call, str(run), "--repair")["ok"]
    assert cached.read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("python", ["forked", "fresh"])
def test_a_resume_is_verified_on_this_machine(
    call: Call, few_rows: dict[str, list[str]], tmp_path: Path, python: str, request: pytest.FixtureRequest
) -> None:
    if python == "forked":
        request.getfixturevalue("forked_python")
    rows = [f"data.{split}={files}" for split, files in few_rows.items()]
    more = ("data.max_examples=16", "training.batch_size=2", "peft.lora_dropout=0.1", "peft.r=2")
    result = call("train", "--verify-resume", "--json", *rows, *more)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["exact"] and "step 4" in report["compared"] and "adapter" in report["compared"]
    assert any("optimizer" in name for name in report["compared"])
    assert not list((tmp_path / "outputs/experiments").iterdir())
    assert call("train", "--verify-resume", "--resume", "latest").exit_code != 0
