"""How fast the dashboard is with many and long runs, and what it costs a run that trains.

    python benchmarks/dashboard.py [--runs 5000] [--steps 100000] [--segments 16] [--parts list page ...]

Needs Chromium and Playwright (`make test-ui` installs both), and two cores. Its parts, each with a server of its own:

- `list`: a folder of so many runs of 20 steps. Seconds from a cold server's start to its address, from opening the page
  to its first row and to all rows, the longest of ten filters typed into the page, and the server's memory.
- `page`: one run of so many steps. Seconds from opening its page to its drawn loss, with a server that has not read it
  and again, the tab's JavaScript heap, and the server's memory.
- `adapter`: whether a short run ends with the same adapter, to the bit, alone and with three pages of it open.
- `training`: step times of one run with three pages open and without, in turns of five seconds, while the run has one
  core, and server and browser another one (`watched_training.py`); `training_one_core`: all on one core.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dashboard_server import open_browser, serve
from machine import described
from playwright.sync_api import Browser, Page
from watched_training import measure_watched_training

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from ui.run_factory import write_run  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "dashboard.json"
WORDS = ("run-1", "run-12", "run-123", "sweep-2", "finished", "sweep-2 run-9", "rows", "nothing", "run-49", "")
PARTS = ("list", "page", "adapter", "training", "training_one_core")
TRAINING = (
    *("train", "data.max_examples=320", "training.epochs=2", "training.batch_size=4"),
    *("tracking.tensorboard=false", "lens.report=false", "output.run_id=run"),
)


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


def compare_adapters(browser: Browser) -> dict[str, Any]:
    """Whether a short run ends with the same adapter alone and with three pages of it open."""
    adapters = [train_adapter(browser, pages=pages) for pages in (0, 3)]
    return {"same_adapter": adapters[0] == adapters[1]}


def train_adapter(browser: Browser, pages: int) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        outputs, run = Path(place), Path(place) / "experiments/default/runs/run"
        command = [sys.executable, "-m", "training_lens", *TRAINING, f"output.base_output_dir={outputs}"]
        with serve(outputs) as (address, _, _process):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not (run / "metadata/summary.json").exists():
                time.sleep(0.1)
            opened = [browser.new_page() for _ in range(pages)]
            for page in opened:
                page.goto(f"{address}/#/run/default/run")
            assert process.wait() == 0
            for page in opened:
                page.close()
        return (run / "artifacts/adapter/adapter_model.safetensors").read_bytes()


def measure_part(name: str, runs: int, steps: int, segments: int) -> dict[str, Any]:
    if name.startswith("training"):
        return measure_watched_training(segments, (0, 0) if name == "training_one_core" else (0, 1))
    with open_browser() as browser:
        if name == "list":
            return measure_list(browser, runs)
        return measure_page(browser, steps) if name == "page" else compare_adapters(browser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = json.loads(options.output.read_text()) if options.output.is_file() else {}
    found = {name: measure_part(name, options.runs, options.steps, options.segments) for name in options.parts}
    options.output.write_text(json.dumps({**known, "machine": described(), **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
