"""One process of two threads against two of one thread, on the same two cores; what is sent, and who waits.

    python benchmarks/scaling.py [--shared ../shared] [--steps 40] [--repeats 3] [--output FILE]

Each training is the same run (a Llama of 40 M random weights, LoRA of rank 16 on every linear layer, batch 16, rows of
T0's long tail), started by torchrun, in turn, `--repeats` times; the first five steps do not count. Written:

- tokens/s, median, of 1 process x 2 threads, 2 x 1 replicated, 2 x 1 sharded;
- bytes that cross the loopback device in a step, by the kernel's counters, against the adapter's gradients in float32;
- idle: the share of a step that a process waits for the slower one before gradients are summed (a barrier in front of
  the sum is timed), with examples shared by tokens, as the loop does, and dealt out in turn as rows.
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
from pathlib import Path
from typing import Any

from estimates import build_llama
from machine import described

WARM_UP = 5  # steps
MODES: dict[str, tuple[int, str, str]] = {  # processes, base, how examples are shared
    "1 process, 2 threads": (1, "replicated", "tokens"),
    "2 processes, 1 thread": (2, "replicated", "tokens"),
    "2 processes, 1 thread, rows dealt in turn": (2, "replicated", "rows"),
    "2 processes, 1 thread, sharded base": (2, "sharded", "tokens"),
}


def train_here(settings: list[str], sharing: str, report: Path) -> None:
    """One process of a training: runs it, and writes its steps' seconds, waits and bytes."""
    import numpy as np
    from torch import distributed

    from training_lens import TrainingWrapper
    from training_lens.config.compose import compose
    from training_lens.data import batching
    from training_lens.training.loop import dataloader
    from training_lens.training.loop.callbacks import Callback, StepReport
    from training_lens.training.loop.gradient_sum import GradientSum

    if sharing == "rows":

        def deal(lengths: np.ndarray, processes: int) -> np.ndarray:
            return np.arange(len(lengths)) % processes

        batching.assign_processes = dataloader.assign_processes = deal
    waits: list[float] = []
    plain_finish = GradientSum.finish

    def finish(self: GradientSum) -> None:
        started = time.perf_counter()
        if distributed.is_initialized():
            distributed.barrier()
        waits.append(time.perf_counter() - started)
        plain_finish(self)

    GradientSum.finish = finish  # type: ignore[method-assign]
    steps: list[dict[str, float]] = []

    class Steps(Callback):
        def on_step_end(self, trainer: Any, report: StepReport) -> None:
            steps.append({"seconds": report.seconds, "tokens": report.tokens, "bytes": loopback_bytes()})

    TrainingWrapper(compose(None, settings, {}, None), callbacks=(Steps(),)).train()
    rank = int(os.environ.get("RANK", "0"))
    own = [{**step, "wait": wait} for step, wait in zip(steps, waits, strict=True)]
    (report / f"{rank}.json").write_text(json.dumps(own))


def loopback_bytes() -> int:
    """Bytes received by the loopback device since the system started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def measure(mode: str, settings: list[str], folder: Path) -> dict[str, float]:
    """One training in a mode."""
    processes, base, sharing = MODES[mode]
    own = [*settings, f"distributed.base={base}", f"output.base_output_dir={folder.parent}/outputs"]
    worker = [__file__, "--worker", sharing, str(folder), *own]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // processes)}
    subprocess.run([sys.executable, *launch, *worker], check=True, env=environment, stdout=subprocess.DEVNULL)
    ranks = [json.loads((folder / f"{rank}.json").read_text())[WARM_UP:] for rank in range(processes)]
    seconds = sum(step["seconds"] for step in ranks[0])
    return {
        "tokens_per_second": sum(step["tokens"] for step in ranks[0]) / seconds,
        "idle_share": statistics.mean(sum(step["wait"] for step in rank) for rank in ranks) / seconds,
        "bytes_per_step": (ranks[0][-1]["bytes"] - ranks[0][0]["bytes"]) / (len(ranks[0]) - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scaling.json"))
    args = parser.parse_args()
    shared = args.shared.resolve()
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = build_llama(folder / "llama-40m", shared / "tokenizers/phi3", 512, 8)
        settings = [f"model.id={model}", f"data.train={shared}/data/t0_per_template/*.jsonl", "data.max_examples=2000"]
        settings += ["training.batch_size=16", f"training.max_steps={args.steps}", "peft.r=16", "model.device=cpu"]
        settings += ["lens.enabled=false", "tracking.samples=0", "tracking.tensorboard=false"]
        for turn in range(args.repeats):
            for place_in_turn, mode in enumerate(MODES):
                spot = folder / f"{turn}-{place_in_turn}"
                spot.mkdir()
                found[mode].append(measure(mode, settings, spot))
                print(mode, json.dumps(found[mode][-1]), file=sys.stderr)
        summary = json.loads(next((folder / "outputs").rglob("summary.json")).read_text())
    medians = {
        mode: {name: round(statistics.median(r[name] for r in results), 4) for name in results[0]}
        for mode, results in found.items()
    }
    alone = medians["1 process, 2 threads"]["tokens_per_second"]
    for values in medians.values():
        values["ratio"] = round(values["tokens_per_second"] / alone, 3)
    result = {
        "steps": args.steps,
        "repeats": args.repeats,
        "gradient_bytes": 4 * summary["trainable_parameters"],
        "modes": medians,
        "machine": described(),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        train_here(sys.argv[4:], sys.argv[2], Path(sys.argv[3]))
    else:
        main()
