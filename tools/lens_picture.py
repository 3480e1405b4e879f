"""Write docs/lens/report.png: the verdict and one heat map of a run, as its report shows them.

    training-lens train +experiment=default
    python tools/lens_picture.py [RUN] [--browser chromium]

The page is made of the report's own parts, and a headless Chromium takes its picture. RUN is a run's folder; without
it, the latest finished run of the experiment `default`.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
from training_lens.analysis.figures.catalogue import REPORT_FIGURES
from training_lens.analysis.reports.executive import build_verdict
from training_lens.analysis.run_facts import find_verdict, read_changes, read_losses
from training_lens.display.html import Picture, write_page
from training_lens.runs.run_lookup import find_run

PICTURE = Path(__file__).parents[1] / "docs" / "lens" / "report.png"
WIDTH, HEIGHT = 1000, 700  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run's folder")
    parser.add_argument("--browser", default="chromium", help="the command that starts Chromium")
    args = parser.parse_args()
    run = args.run or find_run("latest", "outputs", "default", finished=True).root
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        write_part_of_report(run, page)
        take_picture(args.browser, page, PICTURE)
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


def write_part_of_report(run: Path, page: Path) -> None:
    """A page with the verdict, whether it learned, and how strongly each layer is changed."""
    analysis = CheckpointAnalyzer(run).analyze()
    drawing = next(figure for figure in REPORT_FIGURES if figure.name == "update_strength")
    parts = [
        build_verdict(analysis.findings, find_verdict(analysis.recording)),
        read_losses(analysis.recording).as_sentence(),
        read_changes(analysis.recording).as_sentence(),
        Picture(drawing.title, drawing.draw(analysis.recording), drawing.caption),
    ]
    write_page(page, "What the lens saw", parts)


def take_picture(browser: str, page: Path, to: Path) -> None:
    """A picture of the page's top, WIDTH x HEIGHT pixels."""
    ways = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
    size = [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={to}"]
    subprocess.run([browser, *ways, *size, page.as_uri()], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
