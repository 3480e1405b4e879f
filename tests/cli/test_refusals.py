"""What is missing or mistyped is said before torch is imported: commands of `benchmarks/refusals.py`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CALLS = """
import json, sys
from typer.testing import CliRunner
from training_lens.cli import cli

told = {}
for name, arguments in json.loads(sys.stdin.read()).items():
    result = CliRunner().invoke(cli, arguments)
    told[name] = [result.exit_code, " ".join(result.stderr.split()), repr(result.exception), "torch" in sys.modules]
print(json.dumps(told))
"""


def load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refusals", ROOT / "benchmarks/refusals.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_benchmark()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command said, its exit code, and whether torch was there by then: all in one process."""
    folder = tmp_path_factory.mktemp("refused")
    BENCHMARK.lay_out(folder)
    calls = json.dumps({name: arguments for name, (arguments, _) in BENCHMARK.REFUSALS.items()})
    process = subprocess.run(
        [sys.executable, "-c", CALLS], cwd=folder, input=calls, capture_output=True, text=True, check=True
    )
    values = json.loads(process.stdout.splitlines()[-1])
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("name", BENCHMARK.REFUSALS)
def test_a_refusal_needs_no_torch(told: dict[str, Any], name: str) -> None:
    code, said, exception, torch = told[name]
    assert code in (1, 2), (said, exception)
    assert BENCHMARK.REFUSALS[name][1] in said
    assert "Traceback" not in said and not torch
