"""What runs plan on GPUs of each size is what the documentation says."""

from __future__ import annotations

from pathlib import Path

from forked import fork_script  # type: ignore[import-not-found]

ROOT = Path(__file__).parents[2]


def test_the_page_has_what_runs_plan_on_gpus_of_each_size(tmp_path: Path) -> None:
    process = fork_script(tmp_path, ROOT / "tools/gpu_plans.py", "--check")
    process.join()
    assert process.exitcode == 0, (tmp_path / "stderr.txt").read_text()[-500:]
