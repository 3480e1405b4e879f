"""What runs plan on GPUs of each size is what the documentation says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_what_runs_plan_on_gpus_of_each_size() -> None:
    call = [sys.executable, str(ROOT / "tools/gpu_plans.py"), "--check"]
    checked = subprocess.run(call, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr[-500:]
