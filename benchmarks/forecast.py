"""Runs of N and of 2 N steps, and how well the loss of the longer one is foretold from the shorter one.

    python benchmarks/forecast.py measure [--seconds 3000] [--output FILE]
    python benchmarks/forecast.py fit

`measure` trains pairs of runs that differ in their number of steps alone, each with a schedule over its own length: two
bases (the packaged one on its rows, tinystories on four sets), and rates, ranks, schedules, row counts and lengths
that a seed draws. It starts no pair after `--seconds` and continues where it was stopped; forty minutes on one core.

`fit` fits the law of `training_lens.measures.curves` to the pairs of even number, and counts how often its
interval holds the truth for the pairs of odd number, which it has not seen. Both write `results/forecast.json`. Needs
../shared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import described

from training_lens import TrainingConfig, TrainingWrapper, embedded
from training_lens.measures.curves import FLOOR, fit_law, measure_late_gain, measure_multiple
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent / "planted"))
from planted_rows import PATTERN, ROWS, TINYSTORIES, draw_rows, read_jsonl

RESULTS = Path(__file__).parent / "results" / "forecast.json"
PAIRS = 80
QUIET = {"tensorboard": False, "samples": 0, "histograms_every": None}
BASES = {"embedded": embedded.PATHS[embedded.MODEL], "tinystories": TINYSTORIES}
FACTORS = {"short": 1, "long": 2}  # of a pair's steps
CONFIDENCE = 0.9
GOOD_RATES = {"embedded": 3e-3, "tinystories": 1e-2}  # near the best of short runs
VALIDATION = 32


@dataclass(frozen=True)
class Setting:
    """What a pair of runs has in common."""

    number: int
    base: str
    data_set: str
    rows: int
    steps: int
    lr: float
    rank: int
    scheduler: str
    batch_size: int


def draw_setting(number: int) -> Setting:
    """The setting of a pair; bases and sets of rows take turns, the rest is drawn."""
    draw = random.Random(number)
    data_sets = ("own", *sorted(ROWS))
    data_set = data_sets[number // 2 % len(data_sets)]
    base = "embedded" if data_set == "own" else "tinystories"
    return Setting(
        number,
        base,
        data_set,
        rows=draw.choice((40, 80, 160, 320)),
        steps=draw.choice((30, 45, 64, 90)),
        lr=GOOD_RATES[base] * draw.choice((0.1, 0.3, 0.3, 1.0, 1.0, 2.0)),
        rank=draw.choice((2, 8, 16)),
        scheduler=draw.choice(("cosine", "linear", "constant")),
        batch_size=4,
    )


def train(setting: Setting, steps: int, folder: Path) -> list[tuple[int, float]]:
    """The validations of a run of so many steps: (step, loss) from step 0, the base."""
    if setting.data_set == "own":
        lists = [read_jsonl(embedded.PATHS[name]) for name in ("embedded:train", "embedded:heldout")]
        draw = random.Random(setting.number)
        rows: dict[str, Any] = {
            name: draw.sample(part, count)
            for name, part, count in zip(("train", "validation"), lists, (setting.rows, VALIDATION), strict=True)
        }
    else:
        train_rows, validation = draw_rows(setting.data_set, setting.number, setting.rows, VALIDATION)
        rows = {"train": train_rows, "validation": validation, "template": PATTERN}
    config = TrainingConfig.model_validate(
        {
            "model": {"id": str(BASES[setting.base])},
            "data": rows,
            "peft": {"r": setting.rank},
            "training": {
                "lr": setting.lr, "max_steps": steps, "batch_size": setting.batch_size, "seed": setting.number,
                "scheduler": setting.scheduler, "eval_steps": max(1, steps // 8),
            },
            "lens": {"enabled": False},
            "tracking": QUIET,
            "output": {"base_output_dir": str(folder), "run_id": f"{setting.number}-{steps}"},
        }
    )  # fmt: skip
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    lines = read_metrics(run.metrics_file)
    return [(line["step"], line["loss"]) for line in lines if line["kind"] in ("base", "validation")]


def measure(seconds: float, output: Path) -> None:
    """Train the pairs that `output` lacks."""
    found = json.loads(output.read_text()) if output.is_file() else {"machine": described(), "pairs": []}
    done, end = {pair["setting"]["number"] for pair in found["pairs"]}, time.monotonic() + seconds
    for setting in map(draw_setting, range(PAIRS)):
        if setting.number in done or time.monotonic() > end:
            continue
        with tempfile.TemporaryDirectory() as place:
            runs = {name: train(setting, factor * setting.steps, Path(place)) for name, factor in FACTORS.items()}
        found["pairs"].append({"setting": asdict(setting), **runs})
        output.write_text(json.dumps(found) + "\n")
        print(setting, [run[-1] for run in runs.values()], flush=True)


def fit(path: Path) -> None:
    """Fit the law to the pairs of even number, and add it and its hits on the others to the file."""
    found = json.loads(path.read_text())
    halves: tuple[list[Point], list[Point]] = ([], [])
    for pair in found["pairs"]:
        if point := describe_pair(pair):
            halves[pair["setting"]["number"] % 2].append(point)
    seen, unseen = halves
    law = fit_law([p.late for p in seen], [p.multiple for p in seen], CONFIDENCE)
    inside = [p for p in unseen if p.late <= law.most_late]
    hits = [law.low <= point.multiple <= law.high for point in inside]
    found["law"] = asdict(law)
    found["unseen"] = {
        "pairs": len(unseen), "forecast": len(inside), "held": sum(hits), "coverage": sum(hits) / len(hits),
        "median_width_of_gain": statistics.median((law.high - law.low) * max(p.late, FLOOR) for p in inside),
    }  # fmt: skip
    path.write_text(json.dumps(found) + "\n")
    print(json.dumps({"law": found["law"], "unseen": found["unseen"]}, indent=1))


@dataclass(frozen=True)
class Point:
    """A pair as the law sees it."""

    late: float
    multiple: float


def describe_pair(pair: dict[str, Any]) -> Point | None:
    """The pair's late gain and multiple; None where its short run gained nothing."""
    (_, base), *short = pair["short"]
    steps, losses = (np.array(column) for column in zip(*short, strict=True))
    measured = measure_late_gain(steps, losses, base)
    if measured is None:
        return None
    change = min(loss for _, loss in pair["long"][1:]) - float(losses.min())
    return Point(measured[1], measure_multiple(measured[1], measured[0], change))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "fit"))
    parser.add_argument("--seconds", type=float, default=3000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what == "measure":
        measure(options.seconds, options.output)
    else:
        fit(options.output)
