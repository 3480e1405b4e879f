"""A million rows of JSONL prepared in bounded memory, killed in the middle, and taken from the cache.

    python benchmarks/prepare_million.py [--rows 1000000]

Writes rows of the embedded set, numbered, to a temporary file, and runs `training-lens validate` on them: killed once
in the middle of tokenizing, then to its end, then again from the cache. Prints one JSON object: rows, tokens, seconds
and the peak memory of each (the process's largest resident set), and what the kill left in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from training_lens import embedded


def write_rows(path: Path, count: int) -> None:
    lines = embedded.PATHS[embedded.TRAIN].read_text(encoding="utf-8").splitlines()
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(islice(cycle(lines), count)):
            row = json.loads(line)
            file.write(json.dumps({**row, "input": f"Note {number}. {row.get('input', '')}"}) + "\n")


def validate(rows: Path, outputs: Path) -> list[str]:
    base = [sys.executable, "-m", "training_lens", "validate", "--json"]
    return [*base, f"data.train={rows}", f"output.base_output_dir={outputs}", "training.max_steps=1000"]


def killed(call: list[str], outputs: Path) -> list[str]:
    """Kill the command while it writes tokens; what is left in the cache besides the temporary folder."""
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(file.stat().st_size > 20_000_000 for file in outputs.glob("cache/.tmp-*/examples.arrow")):
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return [path.name for path in (outputs / "cache").iterdir() if not path.name.startswith(".tmp-")]


def measured(call: list[str]) -> tuple[Any, dict[str, float]]:
    """The command's JSON, and its wall seconds and largest resident set."""
    started = time.perf_counter()
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, printed
    seconds = time.perf_counter() - started
    return json.loads(printed), {"seconds": round(seconds, 1), "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, outputs = Path(folder) / "rows.jsonl", Path(folder) / "outputs"
        write_rows(rows, args.rows)
        call = validate(rows, outputs)
        left = killed(call, outputs)
        report, first = measured(call)
        _, second = measured(call)
        result = {
            "rows": args.rows,
            "file_bytes": rows.stat().st_size,
            "examples": report["train_examples"],
            "tokens": report["tokens"],
            "left_in_cache_by_the_kill": left,
            "prepare_and_validate": first,
            "again_from_the_cache": second,
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
