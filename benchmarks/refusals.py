"""How long a mistyped command takes to say so: seconds of wall time and of CPU, each command in a fresh interpreter.

python benchmarks/refusals.py
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 3
RESULTS = Path(__file__).parent / "results/refusals.json"
RUN = "20260101T000000Z-aaaa"

# what is wrong: (the command's arguments, a part of what it says)
REFUSALS: dict[str, tuple[list[str], str]] = {
    "training file missing": (
        ["train", "data.train=row.jsonl"],
        "'row.jsonl' is not there. Did you mean 'rows.jsonl'?",
    ),
    "validation file missing": (["validate", "data.train=rows.jsonl", "data.validation=no.jsonl"], "is not there"),
    "model folder missing": (
        ["train", "data.train=rows.jsonl", "model.id=./mdoel"],
        "no folder './mdoel'. Did you mean",
    ),
    "model folder without config.json": (["train", "data.train=rows.jsonl", "model.id=model"], "holds no config.json"),
    "template file missing": (["validate", "data.template=no.jinja"], "data.template: 'no.jinja' cannot be read"),
    "adapter to go on from missing": (["train", "peft.from_adapter=no"], "peft.from_adapter: no folder 'no'"),
    "run id taken": (["train", f"output.run_id={RUN}"], "exists already"),
    "folder without rows": (["train", "data.train=model"], "is a folder, expected files"),
    "hub's name mistyped": (["train", "data.train=hub:rows"], "is not understood; write hub:OWNER/NAME"),
    "wrong key": (["train", "training.lrr=1"], "did you mean 'training.lr'?"),
    "setting as an option": (["train", "--lr", "1e-3"], "Did you mean training.lr=1e-3?"),
    "config file missing": (["train", "--config", "no.yaml"], "cannot be read"),
    "preset missing": (["train", "+experiment=quick_tset"], "Did you mean 'quick_test'?"),
    "sweep's rows missing": (["sweep", "sweep=lr", "data.train=no.jsonl"], "is not there"),
    "prepare's rows missing": (["prepare", "data.train=no.jsonl"], "is not there"),
    "prepare's folder taken": (["prepare", "data.train=rows.jsonl"], "is there already"),
    "run to resume missing": (["train", "--resume", "20260101T000000Z-aaab"], f"Did you mean '{RUN}'?"),
    "run to ask missing": (["infer", "A prompt", "--run", "nowhere"], "no run 'nowhere'"),
    "run to evaluate missing": (["evaluate", "--run", "nowhere"], "no run 'nowhere'"),
    "run to compare missing": (["compare", "--run", "nowhere"], "no run 'nowhere'"),
    "run without an adapter": (["infer", "A prompt", "--run", RUN], "has no finished adapter"),
    "last run not finished": (["compare"], "expected one that is finished"),
    "baseline's model missing": (["baseline", "model.id=./mdoel", "data.train=rows.jsonl"], "no folder './mdoel'"),
    "run to analyze missing": (["analyze", "nowhere"], "no run 'nowhere'"),
    "folder to report missing": (["report", "./no/where"], "no run './no/where'"),
    "run to export missing": (["export", "nowhere", "--data-type", "loss"], "no run 'nowhere'"),
    "run to merge missing": (["merge", "--run", "nowhere"], "no run 'nowhere'"),
    "merge's folder taken": (["merge", "--run", "./adapter", "--output", "model"], "no merge wrote rows.txt"),
    "merge into its adapter": (["merge", "--run", "./adapter", "--output", "adapter"], "is the adapter"),
    "run to push missing": (["push", "nowhere", "me/name"], "no run 'nowhere'"),
    "run to sync missing": (["sync", "nowhere"], "no run 'nowhere'"),
    "run to benchmark missing": (["benchmark", "--run", "nowhere"], "no run 'nowhere'"),
    "run to show missing": (["experiment", "show", "nowhere"], "no run 'nowhere'"),
    "prompts missing": (["infer", "--input", "no.jsonl", "--output", "a.jsonl", "inference=base"], "is not there"),
}


def lay_out(folder: Path) -> None:
    """Make what the commands meet: rows, a folder that is no model's, and an interrupted run."""
    (folder / "rows.jsonl").write_text('{"question": "Where?", "answer": "Here."}\n' * 4)
    for name in ("model", "adapter"):
        (folder / name).mkdir()
    (folder / "model/rows.txt").write_text("")
    (folder / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "outputs/data/default").mkdir(parents=True)
    metadata = folder / f"outputs/experiments/default/runs/{RUN}/metadata"
    metadata.mkdir(parents=True)
    (metadata / "config.json").write_text("{}")
    (metadata / "summary.json").write_text('{"status": "interrupted"}')


def time_refusal(arguments: list[str], message: str, folder: Path) -> tuple[float, float]:
    """Seconds of wall time and of CPU until the command has ended."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    call = [sys.executable, "-m", "training_lens", *arguments]
    result = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode not in (1, 2) or message not in " ".join(result.stderr.split()):
        raise SystemExit(f"{arguments}: not refused as expected: {result.stderr}")
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    results: dict[str, object] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "repeats": REPEATS,
    }
    with tempfile.TemporaryDirectory() as name:
        lay_out(Path(name))
        for what, (arguments, message) in REFUSALS.items():
            time_refusal(arguments, message, Path(name))  # compiles what is not compiled yet
            taken = [time_refusal(arguments, message, Path(name)) for _ in range(REPEATS)]
            results[what] = {
                "wall_seconds_median": round(statistics.median(wall for wall, _ in taken), 3),
                "wall_seconds_most": round(max(wall for wall, _ in taken), 3),
                "cpu_seconds_median": round(statistics.median(cpu for _, cpu in taken), 3),
            }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
