"""Training steps beside another program: with threads that sleep soon, as the command has them there, and that spin.

    python benchmarks/busy_machine.py [--repeats 3] [--steps 40]

The embedded default in steps of eight rows, on all cores, alone and beside one process per two cores that computes all
the time (`busy`). `shared` is what the command does by itself; `spinning` sets OpenMP's own count of looks
(GOMP_SPINCOUNT=300000), which the command leaves alone then. In turns; the median step of each run behind its first
ten, the median over the repeats, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from machine import described

RESULTS = Path(__file__).parent / "results/busy_machine.json"
SPINNING = {"GOMP_SPINCOUNT": "300000"}
FIRST = 10  # steps that are left out
SETTINGS = (
    *("train", "data.max_examples=320", "training.batch_size=8", "tracking.samples=0", "tracking.tensorboard=false"),
    *("lens.report=false", "output.run_id=run"),
)


def measure_step(steps: int, environment: dict[str, str]) -> float:
    """The median seconds of a step of one run."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "training_lens", *SETTINGS, f"training.max_steps={steps}"]
        command.append(f"output.base_output_dir={place}")
        subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
        log = Path(place) / "experiments/default/runs/run/logs/metrics.jsonl"
        lines = map(json.loads, log.read_text().splitlines())
        return float(statistics.median([line["seconds"] for line in lines if line["kind"] == "step"][FIRST:]))


@contextmanager
def keep_busy(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for load, count in (("alone", 0), ("busy", max(1, (os.cpu_count() or 1) // 2))):
            for name, environment in (("shared", {}), ("spinning", SPINNING)):
                with keep_busy(count):
                    seconds = measure_step(options.steps, environment)
                found.setdefault(f"{load}, {name}", []).append(seconds)
                print(load, name, seconds, file=sys.stderr)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    result = {
        "machine": described(),
        "step_seconds": found,
        "spinning_over_shared": {
            load: round(medians[f"{load}, spinning"] / medians[f"{load}, shared"], 3) for load in ("alone", "busy")
        },
        "busy_over_alone": {
            name: round(medians[f"busy, {name}"] / medians[f"alone, {name}"], 3) for name in ("shared", "spinning")
        },
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
