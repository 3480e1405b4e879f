"""What each explanation costs beside an epoch of the run's training: seconds and peak memory of the typed commands.

    python benchmarks/explain/costs.py demo | 125m [--folder FOLDER] [--seconds 1400]

- demo: the embedded model and rows, one epoch, four canaries.
- 125m: a Llama of 125 M parameters with random weights, one epoch over 32 rows of GSM8K cut to 128 tokens, four
  validation rows, two kept states: what a larger model costs for each row.

Each command is a process of its own, start and imports included, and so is `train` of one epoch, with its validations:
seconds by the clock and of the processor, and the peak of resident memory. They are compared by the processor's, which
other programs do not change much. Results are added to benchmarks/results/explain_costs.json. A call that ran out of
its seconds ends with exit code 75, and the next one goes on. This script imports no torch, whose memory a child would
inherit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pieces import Pieces

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/explain_costs.json"
GSM8K, TOKENIZER = (ROOT.parent / "shared" / name for name in ("data/gsm8k/train.jsonl", "tokenizers/phi3"))
ROWS, HELD_OUT = 32, 4  # of the 125 M shape
SETTINGS = {
    "demo": ["training.epochs=1", "data.canaries=4"],
    "125m": ["model.id=model", "model.seq_len=128", "data.train=train.jsonl", "data.validation=validation.jsonl",
             "training.epochs=1", "training.batch_size=8", "training.lr=1e-4", "lens.keep_states=2"],
}  # fmt: skip
ANSWER = {"demo": [], "125m": ["inference.max_new_tokens=24"]}
CHOSEN = {"demo": [], "125m": ["--row", "train.jsonl:1", "--candidates", "16"]}
PROMPT = "What is a lens?"


def list_commands(shape: str) -> dict[str, list[str]]:
    """The commands that are measured, by what the results call them, without the run."""
    answer = ["answer", PROMPT, *ANSWER[shape]]
    return {
        "modules": ["modules"],
        "rows": ["rows"],
        "rows --base": ["rows", "--base"],
        "answer": answer,
        "memory": ["memory", *CHOSEN[shape]],
        "answer --rows": [*answer, "--rows"],
        "answer --verify 5": [*answer, "--verify", "5"],
    }


def measure_process(words: list[str], folder: Path) -> dict[str, Any]:
    """Seconds, CPU seconds and peak resident bytes of one `training-lens` process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "training_lens", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(said)
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def prepare_large(folder: Path) -> None:
    """The 125 M model of random weights and the rows."""
    write = f"from training_jobs import write_model; write_model({str(folder / 'model')!r}, '125m', {str(TOKENIZER)!r})"
    subprocess.run([sys.executable, "-c", write], cwd=ROOT / "benchmarks", check=True)
    lines = GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:ROWS]), encoding="utf-8")
    (folder / "validation.jsonl").write_text("".join(lines[ROWS : ROWS + HELD_OUT]), encoding="utf-8")


def train(shape: str, folder: Path) -> dict[str, Any]:
    """The run, and what training it for one epoch took."""
    folder.mkdir(parents=True, exist_ok=True)
    if shape == "125m":
        prepare_large(folder)
    found = measure_process(["train", *SETTINGS[shape], "tracking.tensorboard=false"], folder)
    (run,) = folder.glob("outputs/experiments/*/runs/*")
    lines = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("kind") == "step"]
    tokens = sum(line["tokens"] for line in steps)
    return {**found, "run": str(run.resolve()), "steps": len(steps), "tokens": tokens}


def measure(shape: str, pieces: Pieces, folder: Path) -> dict[str, Any]:
    """What training and every command took."""
    trained = pieces.compute(f"{shape}: train", lambda: train(shape, folder))
    run, commands = trained["run"], {}
    for name, (command, *words) in list_commands(shape).items():
        typed = ["explain", command, run, *words]
        found = pieces.compute(f"{shape}: {name}", lambda typed=typed: measure_process(typed, folder))
        commands[name] = {
            **found,
            "trainings": round(found["cpu_seconds"] / trained["cpu_seconds"], 2),
            "peak_of_training": round(found["peak_bytes"] / trained["peak_bytes"], 2),
        }
    return {"settings": SETTINGS[shape], "train": {k: v for k, v in trained.items() if k != "run"}, **commands}


def describe_machine() -> dict[str, Any]:
    """`machine.described`, in a process of its own."""
    script = "import json, machine; print(json.dumps(machine.described()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "benchmarks", capture_output=True, check=True)
    described: dict[str, Any] = json.loads(done.stdout)
    return described


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SETTINGS))
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/explain-costs")
    parser.add_argument("--seconds", type=float, default=1400.0, help="after which no further command begins")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    folder = args.folder.resolve() / args.shape
    found = measure(args.shape, Pieces(folder / "pieces.json", args.seconds), folder)
    known = json.loads(args.output.read_text()) if args.output.is_file() else {}
    known |= {"machine": {**describe_machine(), "threads": int(os.environ["OMP_NUM_THREADS"])}, args.shape: found}
    args.output.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
