"""The checks for a GPU run on a CPU with small shapes: the script itself is whole before it meets a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork_script  # type: ignore[import-not-found]

SCRIPT = Path(__file__).parents[1] / "tools/gpu_check.py"
NEEDS_CUDA = {"synchronizations", "memory"}


def run_script(folder: Path, *arguments: str, is_fresh: bool = False) -> Any:
    """The checks of the report; of a Python of its own, or of a fork of this one."""
    output = folder / "report.json"
    arguments = ("--device", "cpu", "--small", "--output", str(output), *arguments)
    if is_fresh:
        call = [sys.executable, str(SCRIPT), *arguments]
        done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False, timeout=280)
        code, printed, errors = done.returncode, done.stdout, done.stderr
    else:
        process = fork_script(folder, SCRIPT, *arguments)
        process.join()
        code, printed, errors = process.exitcode, *((folder / f"std{name}.txt").read_text() for name in ("out", "err"))
    assert code == 0, printed + errors[-3000:]
    checks = json.loads(output.read_text())["checks"]
    for name, found in checks.items():
        assert printed.count(f"\n{name} ") + printed.startswith(f"{name} ") == 1, printed
        assert found["status"] == ("not run" if name in NEEDS_CUDA else "ok"), found
        assert found["why" if name in NEEDS_CUDA else "summary"]
    return checks


def assert_kernels_are_exact(cells: Any, kinds: int) -> None:
    assert len(cells) == 4 * kinds
    for name, cell in cells.items():
        if "fp16" in name:
            assert cell == {"status": "not run", "why": "fp16 needs CUDA"}
            continue
        for path in ("fused", "packed"):
            assert max(cell[path]["loss"], cell[path]["worst_gradient"]) <= cell["tolerance"], (name, cell)


@pytest.mark.slow
def test_signatures_and_kernels_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one kind of model, whose norms, activation and windows are the most unusual."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    kernels = import_module("gpu_checks.kernels")
    monkeypatch.setattr(kernels, "KINDS", ("Gemma3Text",))
    checks = run_script(tmp_path, "--only", "signatures", "kernels", "synchronizations")
    assert list(checks) == ["signatures", "kernels", "synchronizations"]
    assert "varlen_attn" in " ".join(checks["signatures"]["signatures"])
    assert_kernels_are_exact(checks["kernels"]["cells"], 1)


@pytest.mark.slow
def test_every_check_passes_or_says_why_it_is_not_run(tmp_path: Path) -> None:
    checks = run_script(tmp_path, is_fresh=True)
    assert_kernels_are_exact(checks["kernels"]["cells"], 5)
    for name in ("signal", "4bit"):
        assert checks[name]["sha256"][0] == checks[name]["sha256"][1]
    assert checks["4bit"]["merge"]["verified"]
    assert "not finite" in checks["infinity"]["error_of_the_step"]
    assert len(checks["training_speed"]["kernels"]) == 10
    assert all(checks["answers"]["same"])


def test_without_a_gpu_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    process = fork_script(tmp_path, SCRIPT)
    process.join()
    assert process.exitcode == 2 and "--device cpu --small" in (tmp_path / "stderr.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"stdout.txt", "stderr.txt"}
