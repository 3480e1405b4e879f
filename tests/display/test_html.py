"""A page needs nothing but itself, and what data says in it is text."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from training_lens.display.html import BulletList, Callout, Picture, PictureGrid, ShortenedCell, Table, write_page

EVIL = "<script>alert('x')</script>"


def test_text_of_data_stays_text_everywhere(tmp_path: Path) -> None:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name=EVIL))
    picture = Picture(EVIL, figure, EVIL)
    boxes = [BulletList([EVIL]), Callout("problem", EVIL, [(EVIL, EVIL)]), picture, PictureGrid([picture])]
    write_page(tmp_path / "page.html", EVIL, [EVIL, f"# {EVIL}", Table(EVIL, [EVIL], [[EVIL]]), figure, *boxes])
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
    assert "<script" not in text and '<td class="number">2</td>' in text


def test_pictures_side_by_side_bring_the_script_along(tmp_path: Path) -> None:
    picture = Picture("Loss", go.Figure(go.Scatter(x=[1, 2], y=[3, 4])), "lower is better")
    write_page(tmp_path / "page.html", "Two", [PictureGrid([picture, picture])])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("plotly.js v") == 1 and text.count("<figcaption>lower is better</figcaption>") == 2


def test_how_grave_a_callout_is_can_be_read_without_colours(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "Boxes", [Callout("warning", "the loss jumps", [("where", "step 7")])])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Warning: the loss jumps" in text and "<dt>where</dt><dd>step 7</dd>" in text


def test_a_phone_shows_the_page_in_its_own_width_and_scrolls_wide_tables(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "Wide", [Table("A table", ["a", "b"], [["1", "2"]])])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'name="viewport" content="width=device-width' in text
    assert '<div class="scroll" tabindex="0" role="region" aria-label="A table"><table>' in text


def test_no_button_sends_a_figures_data_away(tmp_path: Path) -> None:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))
    write_page(tmp_path / "page.html", "Two", [figure, Picture("Loss", figure, "lower is better")])
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count('"showSendToCloud": false') == 2


def test_a_column_of_prose_is_aligned_left_and_one_of_numbers_is_not(tmp_path: Path) -> None:
    rows = [["one", "1.5", "a sentence that is longer than any number"], ["two", "2.5", "short"]]
    write_page(tmp_path / "page.html", "Prose", [Table("A table", ["a", "b", "c"], rows)])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert (
        '<td class="words">short</td>' in text
        and '<td class="number">2.5</td>' in text
        and '<th class="words">c</th>' in text
    )


def test_short_words_align_left_and_numbers_with_their_gaps_right(tmp_path: Path) -> None:
    rows = [["base", "What is 3?", "+1.5", "-"], ["adapter", "3 plus 4", "-", "-"], ["both", "no", "2.0% to 3.1%", "7"]]
    table = Table("A table", ["who", "text", "loss", "rows"], rows)
    assert table.number_columns() == [False, False, True, True]
    write_page(tmp_path / "page.html", "Prose", [table])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<td>no</td>" in text and '<td class="number">+1.5</td>' in text


def test_a_shortened_cell_is_whole_on_hover_and_escaped_in_both(tmp_path: Path) -> None:
    cell = ShortenedCell(f'/home/"x"/{EVIL}.jsonl:7', f"{EVIL}:7")
    write_page(tmp_path / "page.html", "Rows", [Table("A table", ["row", "loss"], [[cell, "1.5"]])])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert cell == f'/home/"x"/{EVIL}.jsonl:7' and EVIL not in text
    assert (
        'title="/home/&#34;x&#34;/&lt;script&gt;' in text
        and ">&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;:7<" in text
    )


def test_cells_of_several_prose_columns_name_their_column_for_phones(tmp_path: Path) -> None:
    row = ["17", "a question that is longer than a number", "an answer that is longer than one"]
    write_page(tmp_path / "page.html", "Rows", [Table("A table", ["row", "prompt", "answer"], [row])])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<table class="stacked">' in text and 'data-column="answer">an answer' in text
