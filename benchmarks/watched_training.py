"""What open pages of the dashboard cost a run that trains.

Runs differ from one another by more than pages cost, so all is measured within one run of many steps, while three
pages are open: the list of runs, the run's page at its curves, and at its layers. Server and browser are stopped
(SIGSTOP) and let go on (SIGCONT) in turns, in the order stopped, open, open, stopped: while they are stopped, it is as
if nothing were open. Each two neighbours are a pair, whose median steps are compared; the intervals of the
median and of the mean ratio are bootstraps over the pairs (a machine that is shared stalls some turns by half, which
moves the mean, not the median). Nothing of a turn is left out: what the pages missed while they were stopped, they read
and draw when they go on, so their CPU seconds in those turns are more than pages take that nobody stops. These are
measured before, and so is what it takes to open the pages. The run validates nothing meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from dashboard_server import open_browser, serve
from playwright.sync_api import Browser

SEGMENT_SECONDS = 5.0
OPENING_SECONDS = 15.0
UNDISTURBED_SECONDS = 60.0
WARM_STEPS = 100
CAPTURES_WITHIN = 120_000  # milliseconds: the lens writes several hundred steps at once
RESAMPLES = 10_000
NEVER = 10**7  # steps
RUN = "experiments/default/runs/run"
SETTINGS = (
    *("train", "data.max_examples=320", f"training.max_steps={NEVER}", "training.batch_size=4"),
    *(f"training.eval_steps={NEVER}", f"training.save_steps={NEVER}", "tracking.samples=0"),
    *("tracking.tensorboard=false", "lens.report=false", "output.run_id=run"),
)
PROCESSES = ("training", "server", "browser")


@dataclass(frozen=True)
class Segment:
    """A part of the run: seconds since 1970, whether pages went on, and the CPU seconds of each of `PROCESSES`."""

    start: float
    end: float
    is_watched: bool
    cpu: tuple[float, ...]


def measure_watched_training(segments: int, cores: tuple[int, int]) -> dict[str, Any]:
    """Step times with pages and without.

    Args:
        segments: a multiple of 4.
        cores: the one that trains, and the one of server and browser; they may be the same.
    """
    os.sched_setaffinity(0, {cores[1]})  # of the server and the browser, too, which this process starts
    with tempfile.TemporaryDirectory() as place:
        outputs = Path(place)
        with serve(outputs) as (address, _, server), train(outputs, cores[0]) as training, open_browser() as browser:
            pids = (training.pid, server.pid)
            opening = measure_segment(pids, lambda: open_pages(browser, address), OPENING_SECONDS, is_watched=True)
            undisturbed = measure_segment(pids, lambda: None, UNDISTURBED_SECONDS, is_watched=True)
            orders = [segment % 4 in (1, 2) for segment in range(segments)]
            try:
                found = [take_turn(pids, is_watched=watched) for watched in orders]
            finally:
                send_signal(pids, signal.SIGCONT)
        steps = read_steps(outputs / RUN / "logs/metrics.jsonl")
    costs = dict(zip(PROCESSES[1:], opening.cpu[1:], strict=True))
    shares = {n: c / UNDISTURBED_SECONDS for n, c in zip(PROCESSES, undisturbed.cpu, strict=True)}
    summary = summarize(found, steps, cores)
    return {**summary, "cpu_seconds_to_open_the_pages": costs, "cpu_seconds_a_second_undisturbed": shares}


@contextmanager
def train(outputs: Path, core: int) -> Iterator[subprocess.Popen[bytes]]:
    """A run that has warmed up, on one core; it is stopped at the end."""
    command = [sys.executable, "-m", "training_lens", *SETTINGS, f"output.base_output_dir={outputs}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(["taskset", "--cpu-list", str(core), *command], **quiet)  # type: ignore[call-overload]
    metrics = outputs / RUN / "logs/metrics.jsonl"
    try:
        while not metrics.is_file() or len(read_steps(metrics)) < WARM_STEPS:
            assert process.poll() is None, "the run ended"
            time.sleep(0.5)
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def read_steps(metrics: Path) -> np.ndarray:
    """The time at the end of each step, and its seconds: (steps, 2)."""
    lines = map(json.loads, metrics.read_text().splitlines()[:-1])
    return np.array([(line["time"], line["seconds"]) for line in lines if line["kind"] == "step"])


def open_pages(browser: Browser, address: str) -> None:
    """Open the list of runs, the run's page, and the run's page at its layers."""
    pages = [browser.new_page() for _ in range(3)]
    for page, name in zip(pages, ("", "run/default/run", "run/default/run"), strict=True):
        page.goto(f"{address}/#/{name}")
    pages[2].locator(".uplot canvas").first.wait_for()  # what comes above pushes the layers down
    pages[2].locator("#layers").scroll_into_view_if_needed()
    pages[2].locator(".heat canvas").wait_for(timeout=CAPTURES_WITHIN)


def take_turn(pids: tuple[int, int], *, is_watched: bool) -> Segment:
    """A segment in which server and browser go on, or are stopped."""
    number = signal.SIGCONT if is_watched else signal.SIGSTOP
    return measure_segment(pids, lambda: send_signal(pids, number), SEGMENT_SECONDS, is_watched=is_watched)


def send_signal(pids: tuple[int, int], number: signal.Signals) -> None:
    """Send a signal to all processes but the training's."""
    training = {pids[0], *(child.pid for child in psutil.Process(pids[0]).children(recursive=True))}
    for child in psutil.Process().children(recursive=True):
        if child.pid not in training:
            child.send_signal(number)


def measure_segment(pids: tuple[int, int], begin: Callable[[], None], seconds: float, *, is_watched: bool) -> Segment:
    before, start = read_cpu(pids), time.time()
    begin()
    time.sleep(max(0.0, start + seconds - time.time()))
    after, end = read_cpu(pids), time.time()
    return Segment(start, end, is_watched, tuple(b - a for a, b in zip(before, after, strict=True)))


def read_cpu(pids: tuple[int, int]) -> tuple[float, ...]:
    """The CPU seconds so far of the training, the server and all processes of the browser."""
    children = psutil.Process().children(recursive=True)
    seconds = {child.pid: sum(child.cpu_times()[:2]) for child in children}
    own = [seconds.pop(pid) for pid in pids]
    return (*own, sum(seconds.values()))


def summarize(segments: Sequence[Segment], steps: np.ndarray, cores: tuple[int, int]) -> dict[str, Any]:
    """The ratios over the pairs of segments, and what each process cost."""
    seconds, cpu, counts = [], [], []
    for segment in segments:
        inside = steps[(steps[:, 0] > segment.start) & (steps[:, 0] <= segment.end), 1]
        seconds.append(float(np.median(inside)))
        cpu.append(segment.cpu[0] / len(inside))
        counts.append(len(inside))
    is_watched = np.array([segment.is_watched for segment in segments])
    costs = {
        name: statistics.mean(s.cpu[i] / (s.end - s.start) for s in segments if s.is_watched)
        for i, name in enumerate(PROCESSES)
    }
    return {
        "cores": "one" if cores[0] == cores[1] else "two",
        "segments": len(segments),
        "segment_seconds": SEGMENT_SECONDS,
        "steps": sum(counts),
        "step_seconds_alone": float(np.median(np.array(seconds)[~is_watched])),
        "step_seconds_watched": float(np.median(np.array(seconds)[is_watched])),
        "ratio_of_median_steps": compare_pairs(np.array(seconds), is_watched),
        "ratio_of_training_cpu_a_step": compare_pairs(np.array(cpu), is_watched),
        "ratio_of_steps_a_second": compare_pairs(np.array(counts, float), is_watched),
        "cpu_seconds_a_second_while_watched": costs,
    }


def compare_pairs(values: np.ndarray, is_watched: np.ndarray) -> dict[str, Any]:
    """The ratio of watched to alone over pairs of neighbours: median and mean, with 95 % bootstrap intervals."""
    pairs, order = np.log(values).reshape(-1, 2), is_watched.reshape(-1, 2)
    ratios = np.where(order[:, 1], pairs[:, 1] - pairs[:, 0], pairs[:, 0] - pairs[:, 1])
    drawn = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    drawn_ratios = ratios[drawn]
    return {
        "median": float(np.exp(np.median(ratios))),
        "interval_of_median": np.exp(np.quantile(np.median(drawn_ratios, 1), [0.025, 0.975])).tolist(),
        "mean": float(np.exp(ratios.mean())),
        "interval_of_mean": np.exp(np.quantile(drawn_ratios.mean(1), [0.025, 0.975])).tolist(),
        "pairs": np.exp(ratios).round(4).tolist(),
    }
