"""A benchmark as a table, and as an HTML page with a figure for each measure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from training_lens.display.html import Table, write_page
from training_lens.inference.benchmark_run import METHOD, Benchmark, Speed
from training_lens.utils.formatting import format_size

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLUMNS = "model, prompt, batch, first token, per token, latency, p50, p95, p99, tok/s, peak MB".split(", ")
COLORS = {"base": "#6e7781", "adapter": "#bc4c00", "merged": "#0969da"}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


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
    figures = [
        _draw_figure(report, "Throughput", "tokens per second", lambda speed: speed.tokens_per_second),
        _draw_figure(report, "Time to first token", "ms, mean", lambda speed: 1000 * speed.first_token.mean),
        _draw_figure(report, "Time per token", "ms, mean of the decode steps", lambda speed: 1000 * speed.token.mean),
        _draw_figure(report, "Latency", "ms, p95 of whole calls", lambda speed: 1000 * speed.latency.p95),
    ]
    settings = report.settings
    method = (
        f"Prompts: {report.prompts}, cut to length with seed {settings.seed}. For each row {settings.new_tokens} new "
        f"tokens, greedy, end tokens or not; {settings.warmup} calls to warm up, then {settings.repetitions} that "
        f"count, {', '.join(settings.models)} in turn. {METHOD}"
    )
    parts = [f"Run {report.run}", *figures, "# Numbers", build_table(report), *list_skipped_cells(report)]
    write_page(path, "Inference benchmark", [*parts, "# How it was measured", _describe_machine(report), method])


def _draw_figure(report: Benchmark, title: str, unit: str, measure: Callable[[Speed], float]) -> Figure:
    """A line for each model (its color) and prompt length (its dash), over batch sizes."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for length, dash in zip(report.settings.prompt_lengths, cycle(DASHES), strict=False):
        for model in report.settings.models:
            cells = [c for c in report.cells if (c.model, c.prompt_length) == (model, length)]
            points = sorted((c.batch_size, measure(c.speed)) for c in cells if c.speed)
            line = {"color": COLORS[model], "dash": dash}
            x, y = [str(size) for size, _ in points], [value for _, value in points]
            figure.add_scatter(x=x, y=y, name=f"{model}, prompt {length}", mode="lines+markers", line=line)
    figure.update_layout(title=title, template="plotly_white", height=420, margin={"t": 50, "b": 50})
    sizes = [str(size) for size in sorted(report.settings.batch_sizes)]
    figure.update_xaxes(title="batch size (rows)", type="category", categoryorder="array", categoryarray=sizes)
    figure.update_yaxes(title=unit, rangemode="tozero")
    return figure


def _describe_machine(report: Benchmark) -> str:
    machine = report.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    weights = ", ".join(f"{name} {format_size(size)}" for name, size in report.weights_bytes.items())
    return (
        f"{machine['device_name']} ({machine['device']}, {machine['threads']} threads), {machine['platform']}, Python "
        f"{machine['python']}, {packages}. Weights in {machine['weights']} ({weights}), quantization "
        f"{machine['quantization']}, attention {machine['attention']}."
    )
