"""The checks for a GPU run on a CPU with small shapes: the script itself is whole before it meets a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "tools/gpu_check.py"
NEEDS_CUDA = {"synchronizations", "memory"}


def run_script(folder: Path, *arguments: str) -> Any:
    output = folder / "report.json"
    call = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--output", str(output), *arguments]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    checks = json.loads(output.read_text())["checks"]
    for name, found in checks.items():
        assert done.stdout.count(f"\n{name} ") + done.stdout.startswith(f"{name} ") == 1, done.stdout
        assert found["status"] == ("not run" if name in NEEDS_CUDA else "ok"), found
        assert found["why" if name in NEEDS_CUDA else "summary"]
    return checks


def assert_kernels_are_exact(cells: Any) -> None:
    assert len(cells) == 20
    for name, cell in cells.items():
        if "fp16" in name:
            assert cell == {"status": "not run", "why": "fp16 needs CUDA"}
            continue
        for path in ("fused", "packed"):
            assert max(cell[path]["loss"], cell[path]["worst_gradient"]) <= cell["tolerance"], (name, cell)


def test_kernels_and_command_line_pass(tmp_path: Path) -> None:
    checks = run_script(tmp_path, "--only", "signatures", "kernels", "command_line")
    assert list(checks) == ["signatures", "kernels", "command_line"]
    assert "varlen_attn" in " ".join(checks["signatures"]["signatures"])
    assert_kernels_are_exact(checks["kernels"]["cells"])


@pytest.mark.slow
def test_every_check_passes_or_says_why_it_is_not_run(tmp_path: Path) -> None:
    checks = run_script(tmp_path)
    assert_kernels_are_exact(checks["kernels"]["cells"])
    for name in ("signal", "4bit"):
        assert checks[name]["sha256"][0] == checks[name]["sha256"][1]
    assert checks["4bit"]["merge"]["verified"]
    assert "not finite" in checks["infinity"]["error_of_the_step"]
    assert len(checks["training_speed"]["kernels"]) == 10
    assert all(checks["answers"]["same"])


def test_without_a_gpu_the_way_out_is_named(tmp_path: Path) -> None:
    code = (
        f"import sys, torch; torch.cuda.is_available = lambda: False; sys.argv = ['gpu_check.py']; "
        f"sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpu_check; gpu_check.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--device cpu --small" in done.stderr
    assert not list(tmp_path.iterdir())
