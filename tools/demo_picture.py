"""Write docs/demo.svg: what `training-lens compare` shows of the latest run. Run `make demo` first."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from training_lens.cli.common import Screen
from training_lens.cli.judgement import show_example, show_verdict
from training_lens.config.judging_sections import EvaluationSection
from training_lens.evaluation.judging import Judge
from training_lens.inference.rows import validation_examples
from training_lens.inference.session import open_run
from training_lens.utils.logging import quiet_libraries
from training_lens.utils.progress import Progress
from training_lens.utils.runs import find_run


def main() -> None:
    quiet_libraries()
    console = Console(record=True, width=112, highlight=False)
    console.print("$ training-lens compare", style="bold")
    run = find_run("latest", "outputs", "default", finished=True)
    judge = Judge(open_run(run), EvaluationSection(), Progress())
    judgement = judge.compare(validation_examples(run, judge.session))
    for show in (show_verdict, show_example):  # what compare begins with; its tables need a page
        show(Screen(console, as_json=False), judgement)
    console.save_svg(str(Path(__file__).parents[1] / "docs" / "demo.svg"), title="make demo")


if __name__ == "__main__":
    main()
