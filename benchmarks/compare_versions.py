"""Speed of two versions of the product, side by side: training, lens, generation, preparation, start-up.

    python benchmarks/compare_versions.py OLD NEW [--repeats 2]

OLD and NEW are checkouts. Each measurement is a command of the product in a process of its own, in turn for both
versions. Ratios are those of speeds, new to old: above 1 is faster. Of a measurement that is repeated, the fastest
counts. Needs GSM8K rows in ../shared; a Llama of 125 M random weights is made here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from machine import described
from training_jobs import ROOT, write_model

RESULTS = Path(__file__).parent / "results" / "versions.json"
ROWS = ROOT.parent / "shared/data/gsm8k/train.jsonl"
PHI3 = ROOT.parent / "shared/tokenizers/phi3"
QUIET = ("tracking.tensorboard=false", "tracking.samples=0", "tracking.histograms_every=null", "lens.report=false")
Cost = TypeVar("Cost", bound=Any)  # what the least is taken of
Measure = Callable[[Path, Path], dict[str, Cost]]
Row = Callable[[Cost, Cost], Mapping[str, Any]]
FIRST_STEPS = 2  # touch memory for the first time, and are not counted
GENERATION = ("benchmark.batch_sizes=[1,16]", "benchmark.prompt_lengths=[64]", "benchmark.new_tokens=32",
              "benchmark.repetitions=2")  # fmt: skip


def run_command(checkout: Path, folder: Path, *arguments: str) -> float:
    """Seconds that a command of this version takes."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "training_lens", *arguments],
        cwd=folder, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(checkout / "src")},
    )  # fmt: skip
    return time.perf_counter() - start


def train(checkout: Path, folder: Path, name: str, *settings: str) -> dict[str, float]:
    """Train a run of this name; the seconds of its median step, and of the whole command."""
    whole = run_command(checkout, folder, "train", f"data.train={ROWS}", f"output.run_id={name}", *QUIET, *settings)
    lines = (folder / f"outputs/experiments/default/runs/{name}/logs/metrics.jsonl").read_text().splitlines()
    steps = [line["seconds"] for line in map(json.loads, lines) if line["kind"] == "step"]
    return {f"{name}: median step": statistics.median(steps[FIRST_STEPS:]), f"{name}: whole command": whole}


def generate(checkout: Path, folder: Path, run: str) -> dict[str, float]:
    """Seconds per generated token of a run's adapter and of its merged model, by batch size."""
    run_command(checkout, folder, "benchmark", "--run", run, "benchmark.models=[adapter,merged]", *GENERATION)
    report = json.loads((folder / f"outputs/experiments/default/runs/{run}/reports/benchmark.json").read_text())
    return {
        f"generate, {cell['model']}, batch {cell['batch_size']}": 1 / cell["speed"]["tokens_per_second"]
        for cell in report["cells"]
        if cell["speed"]
    }


def measure(checkout: Path, folder: Path, model: Path) -> dict[str, float]:
    """Seconds of each measurement with one version; `folder` is empty."""
    large = (f"model.id={model}", "model.seq_len=512", "training.precision=bf16")
    few = ("data.max_examples=56", "training.batch_size=8", "training.epochs=1")
    many = ("data.max_examples=640", "training.batch_size=8", "training.epochs=1", "model.seq_len=256")
    return {
        "prepare 7,473 rows": run_command(checkout, folder, "prepare", f"data.train={ROWS}", "data.val_ratio=0.1"),
        "validate 2,000 rows": run_command(
            checkout, folder, "validate", f"data.train={ROWS}", "data.max_examples=2000"
        ),
        **train(checkout, folder, "embedded", *many, "lens.enabled=false"),
        **train(checkout, folder, "embedded-lens", *many),
        **train(checkout, folder, "llama-125m", *large, *few, "lens.enabled=false"),
        **generate(checkout, folder, "llama-125m"),
        "start-up: infer one token": run_command(
            checkout, folder, "infer", "--run", "embedded", "What is 3 plus 4?", "inference.max_new_tokens=1"
        ),
        "start-up: --help": run_command(checkout, folder, "--help"),
    }


def measure_in_turn(measure: Measure[Cost], checkouts: Mapping[str, Path], repeats: int) -> dict[str, dict[str, Cost]]:
    """The least of each measurement, by version; `measure` gets a checkout and an empty folder."""
    found: dict[str, dict[str, Cost]] = {name: {} for name in checkouts}
    for _ in range(repeats):
        for name, checkout in checkouts.items():
            with tempfile.TemporaryDirectory() as folder:
                for what, cost in measure(checkout, Path(folder)).items():
                    found[name][what] = min(cost, found[name].get(what, cost))
                    print(f"{name}: {what}: {cost}", flush=True)
    return found


def describe_commit(checkout: Path) -> str:
    call = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()


def compare(
    description: str | None, measure: Callable[[Path, Path, Path], dict[str, Cost]], results: Path, row: Row[Cost]
) -> None:
    """Measure the two checkouts of the command line, and write a row for each measurement.

    Args:
        measure: gets a checkout, an empty folder, and a Llama of 125 M random weights.
        row: what is written of an old and a new measurement.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    checkouts = {"old": options.old.resolve(), "new": options.new.resolve()}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        write_model(model, "125m", PHI3)
        found = measure_in_turn(lambda checkout, folder: measure(checkout, folder, model), checkouts, options.repeats)
    rows = [{"measurement": what, **row(old, found["new"][what])} for what, old in found["old"].items()]
    commits = {name: describe_commit(checkout) for name, checkout in checkouts.items()}
    results.write_text(json.dumps({"machine": described(), "commits": commits, "rows": rows}, indent=1) + "\n")
    for values in rows:
        print(*values.values(), sep="  ")


def compare_speed(old: float, new: float) -> dict[str, float]:
    """Seconds of both, and the new one's speed in multiples of the old one's."""
    return {"old_seconds": old, "new_seconds": new, "speed": old / new}


if __name__ == "__main__":
    compare(__doc__, measure, RESULTS, compare_speed)
