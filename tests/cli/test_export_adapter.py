"""`training-lens export-adapter`: its output and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import Result

from training_lens.runs.run_folder import RunFolder

Call = Callable[..., Result]


@pytest.mark.usefixtures("forked_python")
def test_the_measures_are_printed_and_a_second_export_is_refused(call: Call, own_run: RunFolder) -> None:
    result = call("export-adapter", str(own_run.root), "--to", "plain", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["output"] == str(own_run.exported / "plain") and report["verified"] is True
    assert all(check["ok"] for check in report["checks"]) and report["form"] == "plain" and report["rank"] == 16
    assert "the adapter (plain) is in" in result.stderr
    again = call("export-adapter", str(own_run.root), "--to", "plain")
    assert again.exit_code == 2 and "Give --force to replace it" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "plain", "data.template=alpaca"], "export-adapter takes what the run's own config says"),
        (["--to", "onnx"], "Invalid value for '--to'"),
        ([], "Missing option '--to'"),
    ],
)
def test_wrong_usage_is_refused(call: Call, own_run: RunFolder, arguments: list[str], said: str) -> None:
    result = call("export-adapter", str(own_run.root), *arguments)
    assert result.exit_code == 2 and said in result.stderr
