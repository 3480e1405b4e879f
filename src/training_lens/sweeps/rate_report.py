"""The learning-rate finder's result as sentences, a table and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle

import numpy as np

from training_lens.analysis.reports.report_files import Report
from training_lens.display.colors import COLOURS
from training_lens.display.html import BulletList, Part, SvgPicture, Table
from training_lens.display.svg import Curve, render_chart
from training_lens.sweeps.rate_finder import RateSearch, ShortRun


def build_rate_report(found: RateSearch) -> Report:
    """The page: what is advised, the pictures, the table."""
    parts: list[Part] = [BulletList(list(describe_search(found))), *_draw_pictures(found), rate_table(found)]
    return Report("lr", "Learning rate", tuple(parts), found.as_json())


def describe_search(found: RateSearch) -> Iterator[str]:
    """What the runs say, a sentence each; the last one is to copy."""
    advice = found.advice
    noise = "unknown with one seed" if advice.seed_noise is None else f"{advice.seed_noise:.4f} nats"
    default = _name_default(found)
    if advice.kind == "advised" and advice.interval:
        low, high = advice.interval
        yield f"Advised: {advice.rate:g} (95%: {low:.2g} to {high:.2g}). The noise of a seed is {noise}."
    else:
        yield f"Inconclusive: {advice.reason}. The noise of a seed is {noise}."
    if not advice.gain_over_default:
        yield f"The best rate that was tried is {default}."
    elif advice.gain_interval:
        low, high = advice.gain_interval
        better = "better than" if high < 0 else "not measurably better than"
        yield (
            f"The best rate that was tried, {advice.best:g}, is {better} {default}: "
            f"{advice.gain_over_default:+.4f} nats ({low:+.4f} to {high:+.4f})."
        )
    if found.full_steps > found.steps:
        tried, longer = f"{found.steps} of the run's {found.full_steps} steps were tried", 2 * found.steps
        yield f"{tried}: the best rate of the whole run may be another; --steps {longer} shows whether it moves."
    yield copy_line(found)


def _name_default(found: RateSearch) -> str:
    """What the best rate is compared with: the grid's middle, or of the rates that were given the nearest to it."""
    ended = {run.rate for run in found.runs if run.held_out is not None}
    nearest = min(ended, key=lambda rate: abs(math.log(rate / found.default)))
    source = f"{found.default:g}, from {found.default_source}"
    is_tried = math.isclose(nearest, found.default, rel_tol=0.05)  # a rate has two digits
    return f"the one in the middle ({source})" if is_tried else f"{nearest:g}, the nearest to {source}"


def copy_line(found: RateSearch) -> str:
    """The setting of the advised rate, or the command that decides."""
    advice = found.advice
    if advice.kind == "advised":
        return f"training.lr={advice.rate:g}"
    if advice.kind == "flat":
        longer = f"--steps {2 * found.steps} --seeds 3"
        return f"more steps or seeds would decide: {longer}; until then training.lr={advice.best:g}"
    return f"the next grid: --rates {','.join(f'{rate:g}' for rate in advice.next_rates)}"


def rate_table(found: RateSearch) -> Table:
    """A row for each rate: held-out loss by seed, and how its runs ended."""
    seeds = sorted({run.seed for run in found.runs})
    columns = ("rate", *(f"held-out loss, seed {seed}" for seed in seeds), "steps", "seconds", "end")
    rows = []
    for rate in sorted({run.rate for run in found.runs}):
        runs = {run.seed: run for run in found.runs if run.rate == rate}
        losses = [_format_loss(runs.get(seed)) for seed in seeds]
        steps, seconds = sum(len(run.losses) for run in runs.values()), sum(run.seconds for run in runs.values())
        end = "; ".join(dict.fromkeys(run.end for run in runs.values()))
        rows.append((f"{rate:g}", *losses, str(steps), f"{seconds:.1f}", end))
    caption = f"{found.held_out_rows} held-out rows, nats per supervised token; base {found.base_loss:.4f}"
    return Table(caption, columns, rows)


def _format_loss(run: ShortRun | None) -> str:
    return "-" if run is None or run.held_out is None else f"{run.held_out:.4f}"


def _draw_pictures(found: RateSearch) -> Iterator[SvgPicture]:
    curves = []
    for seed, colour in zip(sorted({run.seed for run in found.runs}), cycle(COLOURS), strict=False):
        ended = sorted((r.rate, r.held_out) for r in found.runs if r.seed == seed and r.held_out is not None)
        # A run that ended worse than the base would hide all others.
        shown = np.array([(rate, loss) for rate, loss in ended if loss <= max(found.base_loss, ended[0][1])])
        if len(shown):
            curves.append(Curve(f"seed {seed}", shown[:, 0], shown[:, 1], colour, dots=True))
    advice = found.advice
    if advice.rate and advice.interval and curves:
        lowest = min(float(np.nanmin(curve.values)) for curve in curves)
        ends = np.array([*advice.interval]), np.array([lowest, lowest])
        curves.append(Curve(f"advised: {advice.rate:g}, and its interval", *ends, COLOURS[3], dots=True))
    yield SvgPicture(
        render_chart(curves, "learning rate", "held-out loss", log_x=True),
        f"The held-out loss after {found.steps} steps, in nats per supervised token.",
    )
    first = [run for run in found.runs if run.seed == 0 and len(run.losses) > 1]
    lines = [
        Curve(
            f"{run.rate:g}",
            np.arange(1, len(run.losses) + 1),
            _smooth(run.losses),
            colour,
            dashed=number >= len(COLOURS),
        )
        for number, (run, colour) in enumerate(zip(sorted(first, key=lambda r: r.rate), cycle(COLOURS), strict=False))
    ]
    yield SvgPicture(
        render_chart(lines, "step", "training loss"),
        "The training loss of each rate with the first seed, on the same batches, smoothed over five steps.",
    )


def _smooth(losses: tuple[float, ...], window: int = 5) -> np.ndarray:
    """The mean of the last `window` losses at each step."""
    sums = np.cumsum([0.0, *losses])
    starts = np.maximum(np.arange(1, len(sums)) - window, 0)
    smoothed: np.ndarray = (sums[1:] - sums[starts]) / (np.arange(1, len(sums)) - starts)
    return smoothed
