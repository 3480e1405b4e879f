"""What integrations cost while a run trains: whole runs without any and with all of them, in turn.

    python benchmarks/connected_overhead.py [--pairs 2] [--steps 96] [--shared ../shared]

With all of them: TensorBoard, W&B (offline), MLflow and trackio (local), a mirror on a real S3 server (moto's)
and checkpoints to a real local HTTP server that speaks the hub's API; samples and histograms as they come. The two
servers run at the lowest priority, since they stand elsewhere in life. A Llama of random weights, LoRA of rank 16 on
every linear layer, float32 on CPU: 64 M parameters (12 layers of 512), as in lens_overhead.py. The rows are those of
GSM8K that have nearly the same number of tokens, so that steps take the same time and a difference can be seen.

Written: seconds from the end of one step to the end of the next, as a callback sees them (all that happens between two
steps is in them, the checkpoint in the middle and the last step apart), their median and their sum in each run; the
ratios of each pair, and their medians; what a run takes beyond its last step; CPU seconds of the courier. Then, of one
run behind its first 16 steps: steps with the courier stopped and with it at work, four by four in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lens_overhead import MAIN, write_layers
from transformers import AutoTokenizer

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.training.loop.callbacks import Callback

TOKENS = range(140, 161)  # of a row's question and answer: enough rows for all steps to be of one epoch


class Clock(Callback):
    """When each step ended, and the loop."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, trainer: Any, report: Any) -> None:
        self.ends.append(time.perf_counter())


class InTurn(Clock):
    """Stops the courier and all it started for some steps, lets it go on for as many, in turn, once it is under way."""

    def __init__(self, after: int, steps: int, block: int = 4) -> None:
        super().__init__()
        self._after, self._until, self._block = after, after + steps, block
        self.taken: dict[str, list[float]] = {"stopped": [], "running": []}
        self._now = ""

    def on_step_end(self, trainer: Any, report: Any) -> None:
        super().on_step_end(trainer, report)
        if self._now and report.step <= self._until:
            self.taken[self._now].append(self.ends[-1] - self.ends[-2])
        if report.step >= self._after and (report.step - self._after) % self._block == 0:
            self._now = "running" if self._now == "stopped" else "stopped"
            os.killpg(_courier(), signal.SIGCONT if self._now == "running" else signal.SIGSTOP)

    def on_train_end(self, trainer: Any) -> None:
        os.killpg(_courier(), signal.SIGCONT)


def _courier() -> int:
    """The courier's process group."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return next(int(pid) for pid in children if b"courier" in Path(f"/proc/{pid}/cmdline").read_bytes())


def under_way(model: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Steps of one run behind the first 16: the courier stopped and running in turn; what it missed, it makes up."""
    clock = InTurn(16, steps)
    config = configured(model, folder, 16 + steps + 1, connected=True)  # the last step is the lens's end, too
    config.training.save_steps = None
    TrainingWrapper(config, callbacks=(clock,)).train()
    stopped, running = clock.taken["stopped"], clock.taken["running"]
    return {
        "stopped_seconds": [round(s, 3) for s in stopped],
        "running_seconds": [round(s, 3) for s in running],
        "median_ratio": round(statistics.median(running) / statistics.median(stopped), 4),
        "total_ratio": round(sum(running) / len(running) / (sum(stopped) / len(stopped)), 4),
    }


def write_rows(tokenizer: Path, shared: Path, path: Path) -> None:
    """The rows of GSM8K whose question and answer together have as many tokens as TOKENS says."""
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    lines = (shared / "data/gsm8k/train.jsonl").read_text().splitlines()
    texts = ["{question}\n{answer}".format(**json.loads(line)) for line in lines]
    alike = [line for line, ids in zip(lines, tokens(texts)["input_ids"], strict=True) if len(ids) in TOKENS]
    path.write_text("\n".join(alike) + "\n")


def configured(model: Path, folder: Path, steps: int, connected: bool) -> TrainingConfig:
    """The run, with every integration or none."""
    everything = {
        "tracking": {
            "wandb": {"mode": "offline"},
            "mlflow": {"enabled": True},
            "trackio": {"enabled": True},
            "hub": {"repo": "me/connected", "checkpoints": True},
        },
        "output": {"base_output_dir": str(folder), "mirror": "s3://bucket/mirror"},
    }
    nothing = {
        "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None},
        "output": {"base_output_dir": str(folder)},
    }
    return TrainingConfig.model_validate(
        {
            "model": {"id": str(model), "seq_len": 512},
            "data": {"train": [str(model / "rows.jsonl")]},
            "training": {"epochs": 1, "max_steps": steps, "save_steps": steps // 2, "batch_size": 8, "lr": 1e-4},
            "lens": {"report": False},
            **(everything if connected else nothing),
        }
    )


def trained(model: Path, folder: Path, steps: int, connected: bool) -> dict[str, Any]:
    """One whole run in this process; the step after the checkpoint in the middle is left out."""
    clock = Clock()
    summary = TrainingWrapper(configured(model, folder, steps, connected), callbacks=(clock,)).train()
    ended = time.perf_counter()
    gaps = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    del gaps[steps // 2 - 1], gaps[-1]
    log = (Path(summary.run_dir) / "logs/run.log").read_text()
    courier = [line for line in log.splitlines() if " courier: " in line and " s of CPU in " in line]
    return {
        "step_seconds": round(statistics.median(gaps), 4),
        "all_steps_seconds": round(sum(gaps), 3),
        "end_seconds": round(ended - clock.ends[-1], 2),
        "courier": courier[-1].split(" courier: ")[1] if courier else None,
    }


def servers(folder: Path) -> list[Any]:
    """The S3 server with its bucket, and the hub, at the lowest priority; the environment then leads to them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/integrations"))
    import hub_server
    import s3_server

    hub, s3 = hub_server.Hub(folder / "hub"), s3_server.Server()
    os.environ |= {**s3.environment, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub_server.TOKEN, "HF_HUB_DISABLE_XET": "1"}
    for server in (hub, s3):
        server.start()
        os.setpriority(os.PRIO_PROCESS, server.pid, 19)
    return [hub, s3]


def run_of(kind: str, model: Path, folder: Path, steps: int) -> dict[str, Any]:
    """A run in a process of its own."""
    command = [sys.executable, __file__, "--run", kind, str(model), str(folder), "--steps", str(steps)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(out.splitlines()[-1]))


def measured(folder: Path, shared: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Pairs of whole runs, then one run with its courier stopped in turn."""
    parameters = write_layers(folder / "model", MAIN, shared / "tokenizers/gpt2")
    write_rows(folder / "model", shared, folder / "model/rows.jsonl")
    runs: dict[str, list[dict[str, Any]]] = {"alone": [], "connected": []}
    running = servers(folder)
    try:
        for pair in range(pairs):
            for kind in list(runs) if pair % 2 else reversed(list(runs)):
                runs[kind].append(run_of(kind, folder / "model", folder / f"{kind}-{pair}", steps))
                print(kind, json.dumps(runs[kind][-1]), file=sys.stderr)
        later = run_of("under_way", folder / "model", folder / "under_way", steps)
    finally:
        for server in running:
            server.kill()
    taken = list(zip(runs["alone"], runs["connected"], strict=True))
    ratios = {k: [round(b[k] / a[k], 4) for a, b in taken] for k in ("step_seconds", "all_steps_seconds")}
    return {
        "machine": {"cores": os.cpu_count(), "platform": platform.machine(), "torch": torch.__version__},
        "parameters": parameters,
        "steps": steps,
        **runs,
        "ratios_of_pairs": ratios,
        "median_ratio": {name: round(statistics.median(of), 4) for name, of in ratios.items() if of},
        "under_way": later,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/connected_overhead.json"))
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        kind, model, folder = args.run[0], Path(args.run[1]), Path(args.run[2])
        one = (
            under_way(model, folder, args.steps)
            if kind == "under_way"
            else trained(model, folder, args.steps, kind == "connected")
        )
        print(json.dumps(one))
        return
    with tempfile.TemporaryDirectory() as name:
        result = measured(Path(name), args.shared, args.pairs, args.steps)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({"median_ratio": result["median_ratio"], "under_way": result["under_way"]["total_ratio"]}))


if __name__ == "__main__":
    main()
