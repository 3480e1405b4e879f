"""Speed of two versions of the product, side by side: training, lens, generation, preparation, start-up.

    python benchmarks/compare_versions.py OLD NEW [--repeats 2]

OLD and NEW are checkouts. Both run at the same time, on a core each and with one thread, so that what else the machine
does slows both; after each repeat they change cores. Each measurement is a command of the product in a process of its
own, or answers as `infer` gives them (decode_speed.py). Ratios are those of speeds, new to old: above 1 is faster; the
geometric mean over an even number of repeats, with the lowest and the highest. Seconds are the medians, of CPU time but
for the steps of training. Needs Linux, two cores and GSM8K rows in ../shared; a Llama of 125 M random weights is made
here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from machine import PRECISION, described
from training_jobs import ROOT, write_model

RESULTS = Path(__file__).parent / "results" / "versions.json"
ROWS = ROOT.parent / "shared/data/gsm8k/train.jsonl"
PHI3 = ROOT.parent / "shared/tokenizers/phi3"
QUIET = ("tracking.tensorboard=false", "tracking.samples=0", "tracking.histograms_every=null", "lens.report=false")
Value = TypeVar("Value")
Measurements = dict[str, float]
FIRST_STEPS = 2  # touch memory for the first time, and are not counted
DECODE = Path(__file__).parent / "decode_speed.py"
RUN = "outputs/experiments/default/runs/{}"


def run_command(checkout: Path, folder: Path, *arguments: str) -> float:
    """Seconds of CPU time, user and system, that a command of this version and its children take."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "training_lens", *arguments],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=errors,
            env={**os.environ, "PYTHONPATH": str(checkout / "src")},
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise subprocess.CalledProcessError(process.returncode, arguments, stderr=errors.read())
    return used.ru_utime + used.ru_stime


def train(checkout: Path, folder: Path, name: str, *settings: str) -> Measurements:
    """Train a run of this name; the seconds of its median step, and of the whole command."""
    whole = run_command(checkout, folder, "train", f"data.train={ROWS}", f"output.run_id={name}", *QUIET, *settings)
    lines = (folder / RUN.format(name) / "logs/metrics.jsonl").read_text().splitlines()
    steps = [line["seconds"] for line in map(json.loads, lines) if line["kind"] == "step"]
    return {f"{name}: median step": statistics.median(steps[FIRST_STEPS:]), f"{name}: whole command": whole}


def time_answers(checkout: Path, folder: Path, run: str, *options: str) -> Measurements:
    """New tokens per second of a run's answers, by decode_speed.py with this version and these options."""
    done = subprocess.run(
        [sys.executable, str(DECODE), RUN.format(run), *options],
        cwd=folder, check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(checkout / "src")},
    )  # fmt: skip
    speeds: Measurements = json.loads(done.stdout.splitlines()[-1])
    return speeds


def generate(checkout: Path, folder: Path, run: str) -> Measurements:
    """Seconds per generated token of a run's adapter and of its merged model, by batch size."""
    found = {}
    for model in ("adapter", "merged"):
        for rows in (1, 16):
            speed = time_answers(checkout, folder, run, "--model", model, "--rows", str(rows))
            found[f"generate, {model}, batch {rows}"] = 1 / speed[f"decode {rows}"]
    return found


def measure(checkout: Path, folder: Path, model: Path) -> Measurements:
    """Seconds of each measurement with one version; `folder` is empty."""
    large = (f"model.id={model}", "model.seq_len=512", f"training.precision={PRECISION}")
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


def run_side_by_side(tasks: Mapping[str, Callable[[], Value]], repeat: int) -> dict[str, Value]:
    """What the tasks return that run at once, each on a core of its own, another one at every repeat.

    Threads and the processes that they start stay on their core, on which torch takes one thread.
    """
    cores = sorted(os.sched_getaffinity(0))
    assert len(cores) >= len(tasks), "each has a core of its own"

    def run_pinned(core: int, task: Callable[[], Value]) -> Value:
        os.sched_setaffinity(0, {core})  # of this thread
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        turned = {name: cores[(i + repeat) % len(tasks)] for i, name in enumerate(tasks)}
        running = {name: pool.submit(run_pinned, turned[name], task) for name, task in tasks.items()}
        return {name: future.result() for name, future in running.items()}


def describe_commit(checkout: Path) -> str:
    call = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()


def compare(description: str | None, measure: Callable[[Path, Path, Path], Measurements], results: Path) -> None:
    """Measure the two checkouts of the command line side by side, and write a row for each measurement.

    Args:
        measure: gets a checkout, an empty folder, and a Llama of 125 M random weights; gives what less is better of.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    checkouts = {"old": options.old.resolve(), "new": options.new.resolve()}
    found = []
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as place:
            model = Path(place) / "model"
            write_model(model, "125m", PHI3)
            for name in checkouts:
                (Path(place) / name).mkdir()
            tasks = {name: partial(measure, path, Path(place) / name, model) for name, path in checkouts.items()}
            found.append(run_side_by_side(tasks, repeat))
            print(json.dumps(found[-1]), flush=True)
    rows = [{"measurement": what, **compare_repeats(what, found)} for what in found[0]["old"]]
    commits = {name: describe_commit(checkout) for name, checkout in checkouts.items()}
    found_here = {"machine": described(), "precision": PRECISION, "commits": commits, "rows": rows}
    results.write_text(json.dumps(found_here, indent=1) + "\n")
    for values in rows:
        print(*values.values(), sep="  ")


def compare_repeats(what: str, repeats: list[dict[str, Measurements]]) -> dict[str, Any]:
    """The medians of both versions, and the new one's speed in multiples of the old one's: mean, lowest and highest."""
    ratios = [repeat["old"][what] / repeat["new"][what] for repeat in repeats]
    return {
        **{version: statistics.median(repeat[version][what] for repeat in repeats) for version in ("old", "new")},
        "speed": statistics.geometric_mean(ratios),
        "speeds": [min(ratios), max(ratios)],
    }


if __name__ == "__main__":
    compare(__doc__, measure, RESULTS)
