"""A benchmark as a table, and as an HTML page with a figure for each measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from training_lens.display.colors import COLOURS
from training_lens.display.html import Part, PictureGrid, SvgPicture, Table, write_page
from training_lens.display.svg import Curve, render_chart
from training_lens.inference.benchmark_run import METHOD, Benchmark, Speed
from training_lens.utils.formatting import format_size

COLUMNS = "model, prompt, batch, first token, per token, latency, p50, p95, p99, tok/s, peak MB".split(", ")
COLORS = dict(zip(("base", "adapter", "merged"), COLOURS, strict=False))
MEASURES: tuple[tuple[str, str, Callable[[Speed], float]], ...] = (
    ("Throughput", "tokens per second", lambda speed: speed.tokens_per_second),
    ("Time to first token", "ms, mean", lambda speed: 1000 * speed.first_token.mean),
    ("Time per token, the mean of the decode steps", "ms", lambda speed: 1000 * speed.token.mean),
    ("Latency, the 95th percentile of whole calls", "ms", lambda speed: 1000 * speed.latency.p95),
)


def build_table(report: Benchmark) -> Table:
    """The cells that were measured, times in milliseconds."""
    settings, machine = report.settings, report.machine
    caption = (
        f"{settings.new_tokens} new tokens a row, {settings.repetitions} repetitions, {machine['weights']} on "
        f"{machine['device_name']}; prompt in tokens, batch in rows, times in ms: means, and percentiles of the latency"
    )
    rows = []
    for cell in report.cells:
        if speed := cell.speed:
            latency = speed.latency
            times = (speed.first_token.mean, speed.token.mean, latency.mean, latency.p50, latency.p95, latency.p99)
            milliseconds = [f"{1000 * t:,.1f}" if t < 0.1 else f"{1000 * t:,.0f}" for t in times]
            peak = "-" if speed.peak_bytes is None else f"{speed.peak_bytes / 1e6:,.0f}"
            place = [cell.model, str(cell.prompt_length), str(cell.batch_size)]
            rows.append([*place, *milliseconds, f"{speed.tokens_per_second:,.0f}", peak])
    return Table(caption, COLUMNS, rows)


def list_skipped_cells(report: Benchmark) -> list[str]:
    """A line for each group of cells that were not measured, with the reason."""
    models: dict[tuple[int, int, str], list[str]] = {}
    for cell in report.cells:
        if cell.reason:
            models.setdefault((cell.prompt_length, cell.batch_size, cell.reason), []).append(cell.model)
    return [
        f"not measured: {', '.join(names)} with prompt {length}, batch {rows}: {reason}"
        for (length, rows, reason), names in models.items()
    ]


def write_benchmark_page(path: Path, report: Benchmark) -> None:
    """One HTML file: the figures, the numbers, and how they were measured."""
    figures: list[Part] = []
    for length in report.settings.prompt_lengths:
        if any(cell.speed for cell in report.cells if cell.prompt_length == length):
            figures += [f"# Prompts of {length} tokens", _draw_charts(report, length)]
    settings = report.settings
    method = (
        f"Prompts: {report.prompts}, cut to length with seed {settings.seed}. For each row {settings.new_tokens} new "
        f"tokens, greedy, end tokens or not; {settings.warmup} calls to warm up, then {settings.repetitions} that "
        f"count, {', '.join(settings.models)} in turn. {METHOD}"
    )
    parts: list[Part] = [f"Run {report.run}", *figures, "# Numbers", build_table(report), *list_skipped_cells(report)]
    write_page(path, "Inference benchmark", [*parts, "# How it was measured", _describe_machine(report), method])


def _draw_charts(report: Benchmark, length: int) -> PictureGrid:
    """A chart of each measure over batch sizes, with a line for each model, for prompts of one length."""
    pictures = []
    for title, unit, measure in MEASURES:
        curves = [_read_curve(report, model, length, measure) for model in report.settings.models]
        known = [curve for curve in curves if len(curve.steps)]
        pictures.append(SvgPicture(render_chart(known, "batch size, rows", unit, log_x=True), title))
    return PictureGrid(pictures)


def _read_curve(report: Benchmark, model: str, length: int, measure: Callable[[Speed], float]) -> Curve:
    cells = [cell for cell in report.cells if (cell.model, cell.prompt_length) == (model, length)]
    points = sorted((cell.batch_size, measure(cell.speed)) for cell in cells if cell.speed)
    sizes, values = np.array(points, dtype=float).reshape(-1, 2).T
    return Curve(model, sizes, values, COLORS[model], dots=True)


def _describe_machine(report: Benchmark) -> str:
    machine = report.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    weights = ", ".join(f"{name} {format_size(size)}" for name, size in report.weights_bytes.items())
    return (
        f"{machine['device_name']} ({machine['device']}, {machine['threads']} threads), {machine['platform']}, Python "
        f"{machine['python']}, {packages}. Weights in {machine['weights']} ({weights}), quantization "
        f"{machine['quantization']}, attention {machine['attention']}."
    )
