"""The knob as tables and pictures: loss, KL to the base and general text against the scale of the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from training_lens.analysis.reports.report_files import Report
from training_lens.analysis.scale_sweep import Knob, KnobPoint
from training_lens.display.colors import COLOURS
from training_lens.display.html import BulletList, Part, SvgPicture, Table
from training_lens.display.svg import Curve, render_chart
from training_lens.utils.formatting import format_interval

BLUE, RED, GREEN, PINK = COLOURS[:4]
COLUMNS = ("adapter", "loss", "change", "interval", "gain kept", "KL to base", "interval", "general loss", "its change")
HOW = (
    "Scale s is the adapter with its update times s: W + s (W' - W); 0 is the base, 1 the adapter as trained. Losses "
    "are in nats per supervised token, intervals over rows and paired. KL is the forward KL from the base to the "
    "adapter on the task's rows."
)


def build_knob_report(knob: Knob) -> Report:
    """The page: what is offered, the pictures, the table and how it was measured."""
    parts: list[Part] = [BulletList(list(describe_knob(knob))), *_draw_pictures(knob)]
    parts += [knob_table(knob), "# How it was measured", f"{HOW} {_describe_rows(knob)}", *knob.notes]
    return Report("knob", "How much of the adapter", tuple(parts), knob.as_json())


def _describe_rows(knob: Knob) -> str:
    return (
        f"Task: {knob.rows} rows, {knob.supervised_tokens:,} supervised tokens. General text: {knob.general_source}, "
        f"{knob.general_rows} rows, {knob.general_tokens:,} tokens. {knob.passes} passes over {knob.tokens:,} tokens."
    )


def describe_knob(knob: Knob) -> Iterator[str]:
    """What the numbers say, a sentence each."""
    yield f"{knob.reason[:1].upper()}{knob.reason[1:]}."
    if knob.optimum is not None:
        between = format_interval(knob.optimum_interval, "{:.2f}")
        yield f"The loss is lowest near scale {knob.optimum:.2f} ({knob.confidence:.0%}: {between})."
    else:
        yield "The loss is lowest at an end of the scales, so the best one is not between them."
    if beaten := [p for p in knob.points if p.step is not None and _is_better_checkpoint(knob, p)]:
        names = ", ".join(point.name for point in beaten)
        yield f"Checkpoints with a lower loss at a smaller KL than every scale of as low a loss: {names}."


def _is_better_checkpoint(knob: Knob, checkpoint: KnobPoint) -> bool:
    """Whether no scale has as low a loss at as small a KL."""
    scales = [point for point in knob.points if point.scale is not None]
    return not any(point.loss <= checkpoint.loss and point.kl <= checkpoint.kl for point in scales)


def knob_table(knob: Knob) -> Table:
    """A row for each scale and checkpoint."""
    columns = [*COLUMNS, "interval", *([knob.metric, "interval"] if knob.metric else [])]
    rows = []
    for point in knob.points:
        name = f"{point.name} (offered)" if point.name == knob.offered else point.name
        kept = "-" if point.gain_kept is None else f"{point.gain_kept:.1%}"
        row = [name, f"{point.loss:.4f}", f"{point.change:+.4f}", format_interval(point.change_interval, "{:+.4f}")]
        row += [kept, f"{point.kl:.4f}", format_interval(point.kl_interval, "{:.4f}")]
        row += [f"{point.general_loss:.4f}", f"{point.general_change:+.4f}"]
        row.append(format_interval(point.general_change_interval, "{:+.4f}"))
        if knob.metric:
            value = "-" if point.metric is None else f"{point.metric:.4g}"
            row += [value, format_interval(point.metric_interval, "{:.4g}")]
        rows.append(row)
    return Table(f"by scale of the update; intervals at {knob.confidence:.0%}", columns, rows)


def _draw_pictures(knob: Knob) -> Iterator[SvgPicture]:
    scales = [point for point in knob.points if point.scale is not None]
    offered = [point for point in scales if point.name == knob.offered]
    yield SvgPicture(
        _draw_against_scale(scales, offered, [("loss on the task's rows, against the base", BLUE, "change")]),
        "The loss on the task's rows, less the base's. Below 0 the adapter is better than its base.",
    )
    lines = [
        ("KL to the base, task's rows", RED, "kl"),
        ("loss on general text, against the base", GREEN, "general_change"),
    ]
    yield SvgPicture(
        _draw_against_scale(scales, offered, lines),
        "What it costs: the KL to the base, and how much worse general text is predicted.",
    )
    yield SvgPicture(
        _draw_exchange(knob, scales, offered),
        "The exchange: each dot of the line is a scale, from the base on the left; other dots are checkpoints. A dot "
        "below and left of the line is better than every scale.",
    )


def _draw_against_scale(
    scales: Sequence[KnobPoint], offered: Sequence[KnobPoint], lines: Sequence[tuple[str, str, str]]
) -> str:
    """A curve for each (name, colour, field), with its interval dashed, and a ring at the offered scale."""
    x, curves = _collect(scales, "scale"), []
    for name, colour, field in lines:
        curves.append(Curve(name, x, _collect(scales, field), colour, dots=True))
        lower, upper = np.array([getattr(point, f"{field}_interval") or (np.nan, np.nan) for point in scales]).T
        ends = np.concatenate([x, x[-1:], x]), np.concatenate([lower, [np.nan], upper])  # a gap between the two
        curves.append(Curve("its interval", *ends, colour, dashed=True))
    for point in offered:
        values = [gapped for _, _, field in lines for gapped in (getattr(point, field), np.nan)]
        at = np.full(len(values), point.scale or 0.0)
        curves.append(Curve(f"offered: scale {point.name}", at, np.array(values), PINK, is_marked=True))
    return render_chart(curves, "scale of the update", "nats per token")


def _draw_exchange(knob: Knob, scales: Sequence[KnobPoint], offered: Sequence[KnobPoint]) -> str:
    groups = [("scales of the update", scales, BLUE, False)]
    groups += [(f"checkpoint, {point.name}", [point], RED, False) for point in knob.points if point.step is not None]
    groups += [(f"offered: scale {point.name}", [point], PINK, True) for point in offered]
    curves = [
        Curve(name, _collect(points, "kl"), _collect(points, "loss"), colour, dots=True, is_marked=is_marked)
        for name, points, colour, is_marked in groups
    ]
    return render_chart(curves, "KL to the base, nats per token", "task loss")


def _collect(points: Sequence[KnobPoint], field: str) -> np.ndarray:
    """A field of each point; NaN where it is None."""
    return np.array([np.nan if (value := getattr(point, field)) is None else value for point in points], float)
