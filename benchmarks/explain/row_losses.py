"""What recording the losses of rows costs: CPU seconds of its parts as a share of a step's, and bytes on disk.

    python benchmarks/explain/row_losses.py [--shapes demo 125m] [--output benchmarks/results/explain_row_losses.json]

Two runs under the lens as it comes: the embedded demo, and the 125 M shape of train_speed.py with random weights on
GSM8K rows. Timed is, within ordinary steps, all that exists for the rows' losses: the number of targets of each
example, their sums (`sum_by_example`), the record of the step, and writing the table. The losses of tokens themselves
are those that the step computes anyway. Seconds are of the CPU, all threads, so another process does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import described
from training_jobs import write_model

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.core.lens_writer import LensWriter
from training_lens.core.table_names import ROW_LOSSES
from training_lens.models.factory import load_model
from training_lens.models.fast import engine
from training_lens.runs.run_folder import RunFolder
from training_lens.training.adapted_base import build_trainer
from training_lens.training.lens_callback import build_capture_callback
from training_lens.training.loop.checkpoint_manager import CheckpointManager

SHARED = Path(__file__).parents[3] / "shared"


class Stopwatch:
    """CPU seconds of wrapped functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started

        return timed


def measure(values: dict[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    values |= {"output": {"base_output_dir": str(folder / "outputs")}}
    plan = TrainingWrapper(TrainingConfig.model_validate(values)).plan()
    run = RunFolder(folder / "run").create()
    callback = build_capture_callback(plan, run.lens)
    assert callback is not None
    model = load_model(plan.config.model, plan.processes.device, plan.precision)
    trainer = build_trainer(plan, model, CheckpointManager(run.checkpoints, plan.fingerprint), (callback,))
    watch = Stopwatch()
    engine.sum_by_example = watch.wrap("sums", engine.sum_by_example)
    engine._count_targets = watch.wrap("counts", engine._count_targets)
    callback.lens.record_rows = watch.wrap("record", callback.lens.record_rows)  # type: ignore[method-assign]
    flush = LensWriter._flush_table

    def flush_timed(writer: LensWriter, table: str) -> None:
        (watch.wrap("write", flush) if table == ROW_LOSSES else flush)(writer, table)

    LensWriter._flush_table = flush_timed  # type: ignore[method-assign]
    try:
        trainer.notify_callbacks("on_train_start")
        total, rows = 0.0, 0
        for step in islice(trainer.schedule.iterate_steps(), steps):
            started = time.process_time()
            report = trainer.train_step(step)
            trainer.notify_callbacks("on_step_end", report)
            total += time.process_time() - started
            rows += len(report.row_losses)
        started = time.process_time()
        callback.lens.flush()
        total += time.process_time() - started
    finally:
        LensWriter._flush_table = flush  # type: ignore[method-assign]
    size = sum(path.stat().st_size for path in (run.lens / ROW_LOSSES).iterdir())
    spent = sum(watch.seconds.values())
    return {
        "steps": steps,
        "rows": rows,
        "cpu_ms_per_step": round(1000 * total / steps, 3),
        "row_losses_cpu_ms_per_step": round(1000 * spent / steps, 4),
        "share": round(spent / (total - spent), 6),
        "cpu_ms_by_part": {name: round(1000 * seconds / steps, 4) for name, seconds in sorted(watch.seconds.items())},
        "bytes_per_visit": round(size / rows, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shapes", nargs="+", choices=["demo", "125m"], default=["demo", "125m"])
    parser.add_argument("--demo-steps", type=int, default=780)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/explain_row_losses.json"))
    options = parser.parse_args()
    known = json.loads(options.output.read_text()) if options.output.is_file() else {}
    found: dict[str, Any] = {**known, "machine": described()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "demo" in options.shapes:
            found["demo"] = measure({"training": {"epochs": 3}}, options.demo_steps, folder / "demo")
        if "125m" in options.shapes:
            found["125m"] = measure_large(folder, options.steps)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def measure_large(folder: Path, steps: int) -> dict[str, Any]:
    write_model(folder / "model", "125m", SHARED / "tokenizers/phi3")
    large = {
        "model": {"id": str(folder / "model"), "seq_len": 512},
        "data": {"train": [str(SHARED / "data/gsm8k/train.jsonl")]},
        "training": {"epochs": 1, "batch_size": 8, "lr": 1e-4, "precision": "bf16"},
    }
    return measure(large, steps, folder / "large")


if __name__ == "__main__":
    main()
