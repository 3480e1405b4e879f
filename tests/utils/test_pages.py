"""A page needs nothing but itself, and what data says in it is text."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from training_lens.utils.pages import Table, write_page

EVIL = "<script>alert('x')</script>"


def test_text_of_data_stays_text_everywhere(tmp_path: Path) -> None:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name=EVIL))
    write_page(tmp_path / "page.html", EVIL, [EVIL, f"# {EVIL}", Table(EVIL, [EVIL], [[EVIL]]), figure])
    assert EVIL not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_loads_nothing_from_elsewhere_and_the_script_once(tmp_path: Path) -> None:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))
    write_page(tmp_path / "page.html", "Two figures", [figure, figure])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script src" not in text and "<link" not in text
    assert text.count("plotly.js v") == 1


def test_a_page_without_figures_carries_no_script(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "Words", ["Only words.", Table("A table", ["a", "b"], [["1", "2"]])])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<td>2</td>" in text
