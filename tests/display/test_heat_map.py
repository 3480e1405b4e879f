"""The heat map: signs as colours, numbers in their cells, hostile names as text."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from training_lens.display.colors import ALARM, COLOURS
from training_lens.display.html import ShadedText, ShadedToken, write_page
from training_lens.display.svg import STRONGEST, render_heat_map

SVG = "{http://www.w3.org/2000/svg}"


def test_each_number_has_a_cell_of_its_sign_and_strength() -> None:
    picture = ElementTree.fromstring(render_heat_map(["0", "1"], ["q", "<b>"], np.array([[-4.0, 1.0], [np.nan, 0.0]])))
    cells = {group.find(f"{SVG}title").text: group.find(f"{SVG}rect") for group in picture.iter(f"{SVG}g")}  # type: ignore[union-attr]
    assert list(cells) == ["0 q: -4.0", "0 <b>: 1.0", "1 <b>: 0.0"]
    fills = [(cell.get("fill"), float(cell.get("fill-opacity") or 0)) for cell in cells.values() if cell is not None]
    assert fills[:2] == [(COLOURS[0], STRONGEST), (ALARM, STRONGEST / 4)] and fills[2][1] == 0


def test_an_empty_map_and_zeros_are_drawn() -> None:
    for values in (np.zeros((0, 0)), np.zeros((1, 2)), np.full((1, 2), np.nan)):
        ElementTree.fromstring(render_heat_map(["a"] * len(values), ["b"] * values.shape[1], values))


def test_shaded_tokens_are_text_whatever_they_hold(tmp_path: Path) -> None:
    hostile, empty = ShadedToken("<i>\n", 2.0, '"><script>', True), ShadedToken("", -1.0, "no text")
    shaded = ShadedText("log p", [hostile, empty, ShadedToken("a", 0.0, "")])
    write_page(tmp_path / "page.html", "tokens", [shaded])
    page = (tmp_path / "page.html").read_text()
    assert "&lt;i&gt;\u23ce\n</span>" in page and "<script" not in page and page.count('class="token marked"') == 1
    assert page.count("<span") == 3 and "\u00b7</span>" in page
    assert [shade.split(" ")[3] for _, shade in shaded.shades()] == ["45%,", "22%,", "0%,"]
