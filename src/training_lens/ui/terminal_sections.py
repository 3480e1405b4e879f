"""The parts of the frame of `training-lens watch`: curve, validations, findings, answers, layers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.text import Text

from training_lens.display.terminal_chart import (
    ACCENT,
    DIM,
    SYMBOL_STYLES,
    SYMBOLS,
    Curves,
    Points,
    draw_cells,
    draw_chart,
    draw_heat_map,
    format_end,
)
from training_lens.evaluation.verdict import ORDER
from training_lens.ui.layer_reader import LayerMap
from training_lens.ui.run_state import RunState, Validation
from training_lens.utils.formatting import reveal_controls

GUTTER = 14  # columns of the names of the sections
TABLE = 34  # columns of the validations
LABEL = 10  # columns of what a line of a sample is: prompt, expected, base, adapter
BOLD = "bold"
SEVERITY_STYLES = {"problem": "bold red", "warning": "bold yellow"}
CUT = 4  # times the width: characters of foreign text that are looked at
MOST_LINES = 4  # of a finding


@dataclass(frozen=True)
class FrameSection:
    """A part of the frame: its name, the numbers of lines that it can use, what draws it, and notes below its name.

    `sizes` rise; `draw` takes columns and one of them. Where there is room, sections of a lower `turn` grow first.
    """

    name: str
    sizes: Sequence[int]
    draw: Callable[[int, int], list[Text]]
    notes: tuple[Text, ...] = ()
    turn: int = 2


def fit_line(line: Text, width: int) -> Text:
    """The line, cut with an ellipsis where it is wider."""
    cut = line.copy()
    cut.truncate(max(0, width), overflow="ellipsis")
    return cut


def pad_line(line: Text, width: int) -> Text:
    """The line at exactly this width."""
    cut = fit_line(line, width)
    cut.append(" " * max(0, width - cut.cell_len))
    return cut


def show_foreign(text: Any, width: int, *, keep_end: bool = False) -> str:
    """Text of prompts, answers and names in one line: control characters revealed, and cut to a width at either end."""
    whole, width = str(text if text is not None else ""), max(1, width)
    clean = whole[-CUT * width :] if keep_end else whole[: CUT * width]
    clean = reveal_controls(clean).replace("\n", " ↵ ").replace("\t", " ")
    if cell_len(clean) <= width and len(whole) <= CUT * width:
        return clean
    kept = _take_cells(reversed(clean) if keep_end else clean, width - 1)
    return f"…{kept[::-1]}" if keep_end else f"{kept}…"


def _take_cells(letters: Iterable[str], width: int) -> str:
    """The first letters, as many as fit."""
    taken, used = "", 0
    for letter in letters:
        used += cell_len(letter)
        if used > width:
            break
        taken += letter
    return taken


def _build_note(name: str, note: str) -> FrameSection:
    return FrameSection(name, [1], lambda _width, _lines: [Text(note, DIM)])


def build_chart(state: RunState, *, has_table: bool) -> FrameSection:
    """Training and validation loss over the steps; with the validations as a table beside them."""
    points = {
        "first": Points.from_pairs([] if state.base is None else [(0, state.base)]),
        "part": Points.from_pairs([(each.step, each.loss) for each in state.validations if each.rows is not None]),
        "mark": Points.from_pairs([(each.step, each.loss) for each in state.validations if each.rows is None]),
    }
    curves = Curves(state.curve, points)

    def draw(width: int, lines: int) -> list[Text]:
        chart = draw_chart(curves, (width - TABLE if has_table else width, lines))
        return _join_columns(chart, write_validations(state, lines), width - TABLE) if has_table else chart

    return FrameSection("loss", range(6, 25), draw, _explain_curves(state, curves))


def _explain_curves(state: RunState, curves: Curves) -> tuple[Text, ...]:
    """The legend: what is drawn."""
    rows = next((each.rows for each in state.validations if each.rows is not None), 0)
    names = {"mark": "validation", "part": f"on {rows} rows", "first": "base"}
    notes = [Text.assemble(("⣀ ", ACCENT), ("training", DIM))]
    for symbol, name in names.items():
        if len(curves.points[symbol].steps):
            notes.append(Text.assemble((f"{SYMBOLS[symbol]} ", SYMBOL_STYLES[symbol]), (name, DIM)))
    is_log = curves.axis is not None and curves.axis.is_log
    return (*notes, Text("log scale", DIM)) if is_log else tuple(notes)


def _join_columns(left: Sequence[Text], right: Sequence[Text], width: int) -> list[Text]:
    """Lines side by side, the left ones at the given width."""
    count = max(len(left), len(right))
    padded = [[*side, *[Text()] * (count - len(side))] for side in (left, right)]
    return [pad_line(first, width).append_text(second) for first, second in zip(*padded, strict=True)]


def build_validations(state: RunState) -> FrameSection:
    """The validations as a table of its own, where it does not fit beside the chart."""
    return FrameSection(
        "validation", range(2, 3 + len(state.validations)), lambda _, lines: write_validations(state, lines)
    )


def write_validations(state: RunState, lines: int) -> list[Text]:
    """The last validations, the newest first, and the base's."""
    if not state.validations and state.base is None:
        return [Text.assemble(("   no validation yet", DIM))]
    best = min((each.loss for each in state.validations if each.rows is None), default=None)
    has_base = state.base is not None and (lines > 2 or not state.validations)
    base = [Text.assemble((f"{'base':>7}", DIM), f"{state.base:>9.4f}")] if has_base else []
    room = max(0, lines - 1 - len(base))
    newest = [_write_validation(each, best) for each in state.validations[::-1][:room]]
    return [Text.assemble((f"{'step':>7}{'valid.':>9}{'to base':>9}", DIM)), *newest, *base]


def _write_validation(each: Validation, best: float | None) -> Text:
    change = "" if each.change is None else f"{each.change:+.4f}"
    note = f" {each.rows} rows" if each.rows is not None else " best" if each.loss == best else ""
    style = "red" if each.change is not None and each.change > 0 else ""
    return Text.assemble((f"{each.step:>7,}", DIM), f"{each.loss:>9.4f}", (f"{change:>9}", style), (note, DIM))


def build_findings(state: RunState) -> FrameSection:
    """The active findings, with what to do: the most severe first, then the newest."""
    if state.findings is None:
        return _build_note("findings", "this run looks for none while it trains (lens.live=false)")
    if not state.findings:
        return _build_note("findings", "nothing wrong found so far" if not state.is_over else "none while it trained")
    newest_first = state.findings[::-1]
    found = sorted(newest_first, key=_rank_severity)
    sizes = range(min(2 * len(found), 4), MOST_LINES * len(found) + 1)
    return FrameSection("findings", sizes, lambda width, lines: _write_findings(found, width, lines), turn=0)


def _rank_severity(finding: Mapping[str, Any]) -> int:
    severity = finding.get("severity")
    return ORDER.index(severity) if severity in ORDER else len(ORDER)


def _write_findings(found: Sequence[Mapping[str, Any]], width: int, lines: int) -> list[Text]:
    """What was found and what to do; how many more there are where they do not fit."""
    shown = max(1, min(len(found), lines // 2))
    written = [line for finding in found[:shown] for line in _write_finding(finding, width, lines // shown)]
    if shown < len(found):
        written[-1] = pad_line(written[-1], width - 10).append(f" {len(found) - shown} more", DIM)
    return written


def _write_finding(finding: Mapping[str, Any], width: int, lines: int) -> list[Text]:
    """The title; then what to do; then the evidence, where there is room for it."""
    severity = str(finding.get("severity"))
    title = Text.assemble((show_foreign(finding.get("title"), width), SEVERITY_STYLES.get(severity, BOLD)))
    title.append(f"  {severity} since step {finding.get('step')}", DIM)
    action = _wrap(finding.get("action"), width, lines - 1)
    evidence = _wrap(finding.get("measured"), width, lines - 1 - len(action))
    return [title, *(Text(line, DIM) for line in evidence), *(Text(line) for line in action)]


def _wrap(text: Any, width: int, lines: int) -> list[str]:
    if lines < 1:
        return []
    whole = show_foreign(text, lines * width)
    return textwrap.wrap(whole, width, max_lines=lines, placeholder="…") if whole else []


def build_samples(state: RunState) -> FrameSection:
    """The newest answers to the fixed prompts, beside the base's."""
    newest = max((answer["step"] for sample in state.samples for answer in sample["answers"]), default=0)
    sizes = [3, *(5 * count - 1 for count in range(1, 1 + len(state.samples)))]  # the first without what is expected
    notes = (Text.assemble((f"step {newest:,}", DIM)),)
    return FrameSection("answers", sizes, lambda width, lines: _write_samples(state, width, lines), notes, turn=1)


def _write_samples(state: RunState, width: int, lines: int) -> list[Text]:
    """As many samples as there is room for: all four lines of each, or three of the first."""
    shown = max(1, min(len(state.samples), (lines + 1) // 5))
    written: list[Text] = []
    for sample in state.samples[:shown]:
        written += [*([Text()] if written else []), *_write_sample(sample, width, has_expected=lines >= 4)]
    return written


def _write_sample(sample: Mapping[str, Any], width: int, *, has_expected: bool) -> list[Text]:
    answers = sample["answers"]
    base = next((each.get("generated") for each in answers if each.get("base")), None)
    adapter = next((each.get("generated") for each in reversed(answers) if not each.get("base")), None)
    room = width - LABEL
    lines = {"prompt": Text(show_foreign(sample.get("prompt"), room, keep_end=True), DIM)}
    if has_expected and sample.get("expected"):
        lines["expected"] = Text(show_foreign(sample["expected"], room))
    for name, answer in (("base", base), ("adapter", adapter)):
        lines[name] = Text("not yet", DIM) if answer is None else Text(show_foreign(answer, room))
    return [Text.assemble((f"{name:<{LABEL}}", DIM), line) for name, line in lines.items()]


def build_layers(layers: LayerMap) -> FrameSection:
    """The update strength of each layer over the measured steps."""
    largest = float(layers.values[np.isfinite(layers.values)].max(initial=0.0))
    notes = (
        Text.assemble(("update size", DIM)),
        Text.assemble(("|dW| / |W|", DIM)),
        Text.assemble(("0 ", DIM), *draw_cells([0.0, 0.34, 0.67, 1.0]), (f" {format_end(largest)}", DIM)),
    )
    return FrameSection(
        "layers",
        range(min(4, 1 + len(layers.names)), 2 + len(layers.names)),
        lambda width, lines: draw_heat_map(layers.names, layers.steps, layers.values, (width, lines)),
        notes,
    )
