"""Write docs/demo.svg: what `training-lens compare` shows of the latest run. Run `make demo` first."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from training_lens.cli.common import Screen
from training_lens.cli.compare import show
from training_lens.config.schema import EvaluationSection
from training_lens.evaluation.judging import compare_run
from training_lens.utils.logging import quiet_libraries
from training_lens.utils.progress import Progress
from training_lens.utils.runs import find_run


def main() -> None:
    quiet_libraries()
    console = Console(record=True, width=112, highlight=False)
    console.print("$ training-lens compare", style="bold")
    run = find_run("latest", "outputs", "default", finished=True)
    show(Screen(console, as_json=False), compare_run(run, EvaluationSection(), Progress()))
    console.save_svg(str(Path(__file__).parents[1] / "docs" / "demo.svg"), title="make demo")


if __name__ == "__main__":
    main()
