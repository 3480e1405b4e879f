"""The frames of `training-lens watch`: they fit every size, draw only what was measured, and obey no foreign text."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from training_lens.display.terminal_chart import Curves, Points, draw_chart, draw_heat_map, format_end
from training_lens.runs.run_folder import RunFolder
from training_lens.ui.layer_reader import LayerMap, LayerReader
from training_lens.ui.run_news import list_news
from training_lens.ui.run_state import RunReader, RunState, Validation
from training_lens.ui.terminal import allot_lines, compose_frame, translate_to_ascii
from training_lens.ui.terminal_sections import FrameSection, show_foreign

HOSTILE = "\x1b[2J\x1b]0;title\x07[bold red]x[/] \u202eabc\r\n\t日本語のテキスト 👩‍👩‍👧 e\u0301 " + 500 * "wide 語 "
FINDING: dict[str, Any] = {
    "step": 8,
    "event": "raised",
    "code": "rate_high",
    "severity": "problem",
    "title": "The learning rate is too high",
    "measured": "most steps are clipped",
    "action": "halve training.lr",
    "time": 1.0,
}


@pytest.fixture(scope="module")
def finished(finished_run: RunFolder) -> tuple[RunState, LayerMap]:
    layers = LayerReader(finished_run).read_last_map()
    assert layers is not None
    return RunReader(finished_run).read_state(), layers


def build_hostile(state: RunState) -> RunState:
    """The state with hostile text in each place that a run's data, model or name reaches."""
    samples = tuple(
        {
            "prompt": HOSTILE,
            "expected": HOSTILE,
            "answers": [{"step": 0, "base": True, "generated": HOSTILE}, {"step": 9, "generated": HOSTILE}],
        }
        for _ in range(4)
    )
    finding = {**FINDING, "title": HOSTILE, "measured": HOSTILE, "action": HOSTILE}
    names: dict[str, Any] = dict.fromkeys(("run_id", "experiment", "model", "detail", "headline"), HOSTILE)
    return replace(state, samples=samples, findings=(finding, FINDING), **names)


def read_lines(lines: list[Text]) -> str:
    return "\n".join(line.plain for line in lines)


SIZES = [(columns, lines) for columns in (1, 12, 40, 71, 72, 80, 120, 300) for lines in (1, 3, 10, 24, 70)]


@pytest.mark.parametrize(("columns", "lines"), SIZES)
def test_a_frame_fits_every_size_whatever_the_run_holds(
    finished: tuple[RunState, LayerMap], columns: int, lines: int
) -> None:
    state, layers = finished
    bare = RunState("id", "", "folder", "", "preparing")
    for each in (state, build_hostile(state), bare, replace(build_hostile(state), status="training", headline="")):
        frame = compose_frame(each, layers, columns, lines)
        assert len(frame) <= lines and max(line.cell_len for line in frame) <= columns
        ascii_frame = translate_to_ascii(frame)
        assert all(line.plain.isascii() and line.cell_len <= columns for line in ascii_frame)


def test_foreign_text_is_neither_obeyed_nor_interpreted(finished: tuple[RunState, LayerMap]) -> None:
    state, layers = finished
    page = io.StringIO()
    console = Console(file=page, width=160)
    for line in compose_frame(build_hostile(state), layers, 160, 60):
        console.print(line, no_wrap=True)
    shown = page.getvalue()
    assert not any(letter in shown for letter in "\x1b\x07\r\t\u202e") and "[bold red]x[/]" in shown
    assert "␛[2J" in shown


def test_all_that_is_asked_for_is_on_80_by_24(finished: tuple[RunState, LayerMap]) -> None:
    state, layers = finished
    raised = replace(state, status="training", headline="", findings=(FINDING,))
    frame = read_lines(
        compose_frame(replace(raised, progress={**state.progress, "remaining_seconds": 42.0}), layers, 80, 24)
    )
    total = state.progress["total_steps"]
    for text in (f"step {total} of {total}", "42 s left", "tokens/s", "training", "base", "adapter", "update size"):
        assert text in frame, text
    assert f"{state.validations[-1].loss:.4f}" in frame and f"{state.validations[-1].change:+.4f}" in frame
    assert FINDING["title"] in frame and FINDING["action"] in frame and "since step 8" in frame


def test_what_comes_first_keeps_its_lines_and_the_rest_is_shared() -> None:
    sections = [FrameSection("", sizes, lambda _columns, _lines: []) for sizes in ([3, 4, 5], [2], [4, 9])]
    assert allot_lines(sections, 2) == [0, 2, 0]
    assert allot_lines(sections, 3) == [3, 0, 0]
    assert allot_lines(sections, 11) == [3, 2, 4]  # with a blank line before each but the first
    assert allot_lines(sections, 13) == [5, 2, 4]
    assert allot_lines(sections, 100) == [5, 2, 9]


def test_a_curve_goes_through_its_points_and_no_others() -> None:
    steps = np.arange(1, 41, dtype=float)
    falling = Curves(Points(steps, 41 - steps), {"mark": Points.from_pairs([(40, 1.0)])})
    *rows, axis = (line.plain for line in draw_chart(falling, (28, 11)))
    assert rows[0].split()[0] == "40" and rows[-1].split()[0] == "1" and axis.split() == ["1", "40"]
    assert rows[-1].endswith("●")
    for column in range(20):  # 2 steps in each: a straight line, as a factor of 40 but for the ends is none
        drawn = [i for i, row in enumerate(rows) if row[8:].ljust(20)[column] not in " \u2800"]
        assert 1 <= len(drawn) <= 4, column
    gap = Curves(Points(steps, np.where((steps > 10) & (steps < 30), math.nan, 2.0)), {})
    (line,) = [row.plain for row in draw_chart(gap, (28, 4)) if any("\u2800" < each <= "\u28ff" for each in row.plain)]
    assert set(line[8 + 6 : 8 + 13]) == {" "}


def test_an_axis_is_logarithmic_from_a_factor_of_ten_on() -> None:
    axes = [Curves(Points.from_pairs([(1, low), (2, 9.0)]), {}).axis for low in (1.0, 0.9, 0.0, -1.0)]
    assert [axis is not None and axis.is_log for axis in axes] == [False, True, False, False]
    assert Curves(Points.from_pairs([(1, math.nan)]), {}).axis is None


def test_numbers_at_the_ends_are_short() -> None:
    numbers = [0.0, 1.0, 9.8532, 123.4, 1234.5, 98_765.4, 1e5, 1e300, 0.0123, 1.2e-5, -0.5]
    assert [format_end(each) for each in numbers[:6]] == ["0", "1", "9.85", "123", "1,234", "98,765"]
    assert all(len(format_end(each)) <= 7 for each in numbers)


def test_a_heat_map_has_a_column_for_each_measured_step_and_hides_what_is_not_finite() -> None:
    values = np.array([[0.0, 0.5, 1.0], [math.nan, 1.0, math.inf], [0.1, 0.1, 0.1]])
    lines = [line.plain for line in draw_heat_map(("0", "1", "2"), (1, 5, 500), values, (40, 4))]
    assert lines == ["0 ▁▄▇", "1  ▇ ", "2 ▂▂▂", "  1 500"]
    joined = [line.plain for line in draw_heat_map(("0", "1", "2"), (1, 5, 500), values, (40, 3))]
    assert joined[:2] == ["  0 ▁▄▇", "1-2 ▂▇▂"]
    many = draw_heat_map(("0",), tuple(range(1000)), np.ones((1, 1000)), (40, 2))
    assert many[0].plain == f"0 {38 * '▇'}" and many[1].plain.split() == ["0", "999"]


@pytest.mark.parametrize("keep_end", [False, True])
def test_a_cut_text_is_as_wide_as_it_may_be(keep_end: bool) -> None:
    assert show_foreign("short", 10, keep_end=keep_end) == "short"
    cut = show_foreign("abc" + 1_000_000 * "x" + "xyz", 10, keep_end=keep_end)
    assert cut == ("…xxxxxxxyz"[:1] + "xxxxxxxyz"[-9:] if keep_end else "abcxxxxxx…")
    assert show_foreign(None, 10) == "" and show_foreign("a\nb", 10) == "a ↵ b"


def test_news_are_what_changed_between_two_readings() -> None:
    start = RunState("id", "default", "folder", "", "preparing")
    (first,) = list_news(None, start)
    assert "run id of experiment default: preparing" in first
    assert list_news(start, start) == []
    validations = (Validation(5, 2.0, 3.0, None, 10.0), Validation(6, 1.0, 2.5, 8, 12.0))
    cleared = {"step": 6, "event": "cleared", "code": "rate_high", "title": FINDING["title"], "time": 13.0}
    trains = replace(
        start,
        status="training",
        base=3.0,
        progress={"step": 6, "total_steps": 10},
        validations=validations,
        events=({**FINDING, "time": 11.0}, cleared),
    )
    news = list_news(start, trains)
    expected = [
        "training, step 6 of 10",
        "is 3.0000",
        "2.0000, -1.0000 to the base",
        "halve training.lr.",
        "on 8 rows",
        "cleared",
    ]
    assert len(news) == len(expected) and all(text in line for text, line in zip(expected, news, strict=True)), news
    *_, last, verdict = list_news(trains, replace(trains, status="failed", headline="Worse"))
    assert "failed, step 6 of 10" in last and verdict.endswith("Z Worse")
