"""The pictures of docs/lens/published.md, drawn as SVG from the committed results.

python benchmarks/published/pictures.py [--results benchmarks/results] [--output docs/lens]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

COLORS = ("#1f77b4", "#d95f02", "#2a9d5c", "#7b4fa3", "#c2185b")
WIDTH, HEIGHT, GAP = 340, 250, 20  # of one panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 34, 44  # margins inside it
TICKS = 5


@dataclass(frozen=True)
class Trace:
    """Points of one name; joined by a line where `line` says so."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    line: bool = True


@dataclass(frozen=True)
class Panel:
    """One diagram; `marks` are places on x with a dashed line."""

    title: str
    x_label: str
    y_label: str
    traces: Sequence[Trace]
    marks: Sequence[float] = ()


def svg(panels: Sequence[Panel]) -> str:
    """The panels side by side, two to a row."""
    columns, rows = min(2, len(panels)), math.ceil(len(panels) / 2)
    width, height = columns * (WIDTH + GAP), rows * (HEIGHT + GAP)
    drawn = "".join(
        f'<g transform="translate({i % 2 * (WIDTH + GAP)},{i // 2 * (HEIGHT + GAP)})">{drawing(panel)}</g>\n'
        for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n{drawn}</svg>\n'
    )


def drawing(panel: Panel) -> str:
    """One panel's frame, ticks, traces and legend."""
    x = Axis.of([v for t in panel.traces for v in t.x], LEFT, WIDTH - RIGHT)
    y = Axis.of([v for t in panel.traces for v in t.y], HEIGHT - BOTTOM, TOP)
    bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts = [f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="#444"/>']
    parts += [text(x.at(v), bottom + 15, f"{v:.3g}", "middle") for v in x.ticks()]
    parts += [text(LEFT - 5, y.at(v) + 4, f"{v:.3g}", "end") for v in y.ticks()]
    parts += [
        f'<path d="M{x.at(v):.1f} {TOP}V{bottom}" stroke="#888" stroke-dasharray="4 3" fill="none"/>'
        for v in panel.marks
    ]
    parts += [shape(t, x, y, COLORS[i % len(COLORS)]) for i, t in enumerate(panel.traces)]
    parts += [legend(t, i) for i, t in enumerate(panel.traces)]
    parts += [text((LEFT + WIDTH) / 2, 14, panel.title, "middle", 'font-weight="bold"')]
    parts += [text((LEFT + WIDTH) / 2, HEIGHT - 10, panel.x_label, "middle")]
    parts += [text(12, middle, panel.y_label, "middle", f'transform="rotate(-90 12 {middle})"')]
    return "".join(parts)


@dataclass(frozen=True)
class Axis:
    """From values between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> Axis:
        low, high = min(values), max(values)
        return cls(low, high if high > low else low + 1, start, end)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return [self.low + i / (TICKS - 1) * (self.high - self.low) for i in range(TICKS)]


def shape(trace: Trace, x: Axis, y: Axis, color: str) -> str:
    points = [(x.at(a), y.at(b)) for a, b in zip(trace.x, trace.y, strict=True)]
    if trace.line:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.4"/>'
    return "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}" fill-opacity="0.7"/>' for a, b in points)


def legend(trace: Trace, row: int) -> str:
    """The trace's name: on the right above falling lines, on the left above rising points."""
    x, anchor = (WIDTH - RIGHT - 4, "end") if trace.line else (LEFT + 8, "start")
    return text(x, TOP + 10 + 13 * row, trace.name, anchor, f'fill="{COLORS[row % len(COLORS)]}"')


def text(x: float, y: float, content: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(content)}</text>'


def ranks(results: dict[str, Any]) -> list[Panel]:
    """Loss curves by rank: the two scalings of each model."""
    scalings = {"lora": "alpha/r", "rslora": "alpha/sqrt(r)"}
    return [
        Panel(
            f"{model}: {scaling}",
            "steps done",
            "training loss, nats",
            [Trace(f"r = {r}", range(len(c)), c) for r, c in found["adamw_curves"]["mean_curves"][variant].items()],
        )
        for model, found in results["models"].items()
        for variant, scaling in scalings.items()
    ]


def forgetting(results: dict[str, Any]) -> list[Panel]:
    """The loss on the base's own text against each measure, a color for a learning rate."""
    measures = {"kl": "forward KL on the task, nats", "intruder_energy_0.5": "intruders' energy share (cosine < 0.5)"}
    panels = []
    for model, found in results["models"].items():
        rates = sorted({run["lr"] for run in found["by_run"]})
        for key, label in measures.items():
            traces = []
            for rate in rates:
                runs = [run for run in found["by_run"] if run["lr"] == rate]
                x, y = [run[key] for run in runs], [run["forgetting"] for run in runs]
                traces.append(Trace(f"lr {rate:g}", x, y, line=False))
            panels.append(Panel(model, label, "rise of own-text loss, nats", traces))
    return panels


def staircase(results: dict[str, Any]) -> list[Panel]:
    """Mean loss curves of repeated rows and of as many different ones."""
    given = results["settings"]
    ends = [given["rows"] // given["batch_size"] * epoch for epoch in range(1, given["epochs"])]
    names = {"repeated": f"{given['epochs']} epochs of {given['rows']} rows", "once": "1 epoch of all different rows"}
    return [
        Panel(
            model,
            "step",
            "training loss, nats",
            [
                Trace(label, range(1, len(found[kind]["mean_curve"]) + 1), found[kind]["mean_curve"])
                for kind, label in names.items()
            ],
            marks=[end + 0.5 for end in ends],
        )
        for model, found in results["models"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--output", type=Path, default=Path("docs/lens"))
    args = parser.parse_args()
    for panels in (ranks, forgetting, staircase):
        name = f"published_{panels.__name__}"
        results = json.loads((args.results / f"{name}.json").read_text())
        (args.output / f"{name}.svg").write_text(svg(panels(results)))


if __name__ == "__main__":
    main()
