"""What live findings, the validation sample and sampled answers cost: their CPU seconds in whole runs.

    python benchmarks/live_overhead.py [--output benchmarks/results/live_overhead.json]

Runs of the embedded model on its own rows, and of a Llama with random weights on GSM8K (12 layers, 256 wide). Each part
is timed in the CPU seconds of the whole process, all threads together, so that other processes of the machine do not
count. Written: the CPU seconds of the run's loop, and of each part with its share of the rest of the loop.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lens_overhead import write_layers
from machine import described

from training_lens import TrainingConfig
from training_lens.training.live_findings import LiveFindings
from training_lens.training.loop.trainer import Trainer
from training_lens.training.run import TrainingWrapper
from training_lens.training.samples import SampleWriter

PARTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "loop": (Trainer, ("_run_steps",)),
    "live_findings": (LiveFindings, ("on_step_end", "on_evaluate", "on_evaluate_sample", "on_samples")),
    "validation_sample": (Trainer, ("_validate_sample",)),
    "sampled_answers": (SampleWriter, ("_write_samples",)),
}


def sum_parts(seconds: Counter[str]) -> float:
    """The CPU seconds of all parts of the loop."""
    return sum(seconds[part] for part in PARTS if part != "loop")


def add_cpu_timers(seconds: Counter[str], calls: Counter[str]) -> None:
    """Count the CPU seconds of each part while its methods run."""

    def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def measure(*args: Any, **kwargs: Any) -> Any:
            started, others = time.process_time(), sum_parts(seconds)
            try:
                return method(*args, **kwargs)
            finally:
                inside = sum_parts(seconds) - others if part != "loop" else 0.0  # of the parts that it called
                seconds[part] += time.process_time() - started - inside
                calls[part] += 1

        return measure

    for part, (owner, methods) in PARTS.items():
        for name in methods:
            setattr(owner, name, timed(part, getattr(owner, name)))


def measure_run(values: dict[str, Any], seconds: Counter[str], calls: Counter[str]) -> dict[str, Any]:
    """One run, and the share of its loop that each part took."""
    seconds.clear()
    calls.clear()
    summary = TrainingWrapper(TrainingConfig.model_validate(values)).train()
    rest = seconds["loop"] - sum_parts(seconds)
    shares = {part: round(seconds[part] / rest, 4) for part in PARTS if part != "loop"}
    return {
        "steps": summary.steps,
        "tokens": summary.tokens,
        "loop_cpu_seconds": round(seconds["loop"], 2),
        "cpu_seconds": {part: round(seconds[part], 3) for part in shares},
        "calls": {part: calls[part] for part in shares},
        "share_of_rest": shares,
    }


def list_runs(folder: Path, shared: Path) -> dict[str, dict[str, Any]]:
    """The configs by name: short and long runs, with the defaults of validation and samples."""
    write_layers(folder / "model", 12, shared / "tokenizers/gpt2")
    common = {"lens": {"report": False}, "output": {"base_output_dir": str(folder / "outputs")}}
    gsm8k = {"train": [str(shared / "data/gsm8k/train.jsonl")], "val_ratio": 0.1}
    llama = {"model": {"id": str(folder / "model"), "seq_len": 256}, **common}
    return {
        "embedded, 400 rows, 2 epochs": {"data": {"max_examples": 400}, **common},
        "embedded, 2 epochs": common,
        "12 layers, 400 rows of GSM8K, 2 epochs": {"data": {**gsm8k, "max_examples": 400}, **llama},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/live_overhead.json"))
    parser.add_argument("--only", help="runs whose name contains this; the others' results stay in the file")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results["machine"] = described()
    seconds, calls = Counter[str](), Counter[str]()
    add_cpu_timers(seconds, calls)
    with tempfile.TemporaryDirectory() as name:
        for title, values in list_runs(Path(name), args.shared).items():
            if not args.only or args.only in title:
                results[title] = measure_run(values, seconds, calls)
                print(f"{title}: {json.dumps(results[title])}", file=sys.stderr)
                args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
