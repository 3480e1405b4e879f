"""How fast the dashboard is with many and long runs, and what it costs a run that trains.

    python benchmarks/dashboard.py [--runs 5000] [--steps 100000] [--output benchmarks/results/dashboard.json]

Needs Chromium and Playwright (`make test-ui` installs both). Three parts, each with a server of its own:

- `list`: a folder of so many runs of 20 steps. Seconds from a cold server's start to its address, from opening the page
  to its first row and to all rows, the longest of ten filters typed into the page, and the server's memory.
- `page`: one run of so many steps. Seconds from opening its page to its drawn loss, with a server that has not read it
  and again, the tab's JavaScript heap, and the server's memory.
- `training`: the same short run trained alone and with three pages of it open, in turns. The ratio of the median step's
  seconds, and whether the adapters are the same to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import described
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from ui.run_factory import write_run  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "dashboard.json"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
WORDS = ("run-1", "run-12", "run-123", "sweep-2", "finished", "sweep-2 run-9", "rows", "nothing", "run-49", "")
ADDRESS = re.compile(r"http://\S+")
TURNS = 3
TRAINING = (
    *("train", "data.max_examples=320", "training.epochs=2", "training.batch_size=4"),
    *("tracking.tensorboard=false", "lens.report=false"),
)


@contextmanager
def serve(outputs: Path) -> Iterator[tuple[str, float, subprocess.Popen[str]]]:
    """A server in a process of its own: its address, the seconds until it printed it, and the process."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "training_lens", "ui", str(outputs), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "500"})
    assert process.stdout is not None
    address = None
    while address is None:
        line = process.stdout.readline()
        assert line, "the server ended before it printed its address"
        address = ADDRESS.search(line)
    try:
        yield address[0].rstrip("/"), time.perf_counter() - begun, process
    finally:
        process.terminate()
        process.wait()


def read_memory(process: subprocess.Popen[str]) -> int:
    """The bytes that a process holds in memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def read_heap(page: Page) -> int:
    """The bytes of the tab's JavaScript objects, after a collection."""
    client = page.context.new_cdp_session(page)
    client.send("HeapProfiler.collectGarbage")
    return int(page.evaluate("performance.memory.usedJSHeapSize"))


def measure_list(browser: Browser, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        outputs = Path(place)
        for number in range(count):
            write_run(outputs, f"sweep-{number % 20}", f"run-{number:05d}", steps=20)
        with serve(outputs) as (address, start, process):
            page = browser.new_page()
            begun = time.perf_counter()
            page.goto(address)
            page.locator(".runs tbody tr").first.wait_for()
            first = time.perf_counter() - begun
            page.get_by_text(re.compile(rf"^{count:,} runs in")).wait_for(timeout=600_000)
            whole = time.perf_counter() - begun
            filters = [filter_rows(page, words) for words in WORDS]
            return {
                "runs": count,
                "server_start_seconds": start,
                "first_row_seconds": first,
                "all_rows_seconds": whole,
                "longest_filter_milliseconds": max(filters),
                "server_bytes": read_memory(process),
            }


def filter_rows(page: Page, words: str) -> float:
    """Milliseconds from a change of the filter to the drawn rows."""
    return float(
        page.evaluate(
            """words => {
                const search = document.querySelector("input[type=search]");
                const begun = performance.now();
                search.value = words;
                search.dispatchEvent(new Event("input"));
                document.querySelector(".runs").getBoundingClientRect();
                return performance.now() - begun;
            }""",
            words,
        )
    )


def measure_page(browser: Browser, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        run = write_run(Path(place), "default", "long", steps=steps)
        with serve(Path(place)) as (address, _, process):
            seconds = []
            for _ in range(2):
                page = browser.new_page()
                begun = time.perf_counter()
                page.goto(f"{address}/#/run/default/{run.run_id}")
                page.locator(".uplot canvas").first.wait_for()
                seconds.append(time.perf_counter() - begun)
                page.wait_for_timeout(3000)
                heap = read_heap(page)
                page.close()
            names = ("first_page_seconds", "next_page_seconds")
            memory = {"tab_bytes": heap, "server_bytes": read_memory(process)}
            return {"steps": steps, **dict(zip(names, seconds, strict=True)), **memory}


def measure_training(browser: Browser) -> dict[str, Any]:
    alone, watched, adapters = [], [], set()
    for turn in range(TURNS):
        for is_watched in (False, True) if turn % 2 == 0 else (True, False):
            with tempfile.TemporaryDirectory() as place:
                seconds, adapter = train(browser, Path(place), is_watched)
            (watched if is_watched else alone).append(seconds)
            adapters.add(adapter)
    return {
        "step_seconds_alone": alone,
        "step_seconds_watched": watched,
        "ratio": statistics.median(watched) / statistics.median(alone),
        "same_adapter": len(adapters) == 1,
    }


def train(browser: Browser, place: Path, is_watched: bool) -> tuple[float, str]:
    """The median step's seconds of a run, and the hash of its adapter; with three pages of it open if asked."""
    outputs = place / "outputs"
    outputs.mkdir()
    settings = (f"output.base_output_dir={outputs}", "output.run_id=run")
    command = [sys.executable, "-m", "training_lens", *TRAINING, *settings]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = outputs / "experiments/default/runs/run"
    with serve(outputs) as (address, _, _process):
        process = subprocess.Popen(command, **quiet)
        pages = [browser.new_page() for _ in range(3 if is_watched else 0)]
        while not (run / "metadata/summary.json").exists():
            time.sleep(0.1)
        for page in pages:
            page.goto(f"{address}/#/run/default/run")
        assert process.wait() == 0
        for page in pages:
            page.close()
    lines = map(json.loads, (run / "logs/metrics.jsonl").read_text().splitlines())
    seconds = [line["seconds"] for line in lines if line["kind"] == "step"]
    adapter = (run / "artifacts/adapter/adapter_model.safetensors").read_bytes()
    return statistics.median(seconds[10:]), hashlib.sha256(adapter).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--parts", nargs="+", default=["list", "page", "training"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = json.loads(options.output.read_text()) if options.output.is_file() else {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        parts = {
            "list": lambda: measure_list(browser, options.runs),
            "page": lambda: measure_page(browser, options.steps),
            "training": lambda: measure_training(browser),
        }
        found = {name: parts[name]() for name in options.parts}
        browser.close()
    options.output.write_text(json.dumps({**known, "machine": described(), **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
