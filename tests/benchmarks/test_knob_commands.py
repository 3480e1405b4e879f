"""What the scripts of knob, rank and learning rate put into the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from training_lens.display.html import SvgPicture, write_page
from training_lens.display.svg import Curve, render_chart

ROOT = Path(__file__).parents[2]


@pytest.fixture
def knob_commands(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import knob_commands  # type: ignore[import-not-found]

    return knob_commands


def test_pictures_of_a_page_stand_one_above_the_other(knob_commands: Any, tmp_path: Path) -> None:
    values = np.arange(4.0)
    drawn = [
        render_chart([Curve(name, values, values**2, "#000000")], "step", name) for name in ("loss", "norm", "rate")
    ]
    write_page(tmp_path / "page.html", "a page", [SvgPicture(svg, "a picture") for svg in drawn])
    knob_commands.join_pictures(tmp_path / "page.html", tmp_path / "both.svg", 2)
    whole, *parts = ElementTree.parse(tmp_path / "both.svg").getroot().iter("{http://www.w3.org/2000/svg}svg")
    heights, tops = ([int(part.attrib[name]) for part in parts] for name in ("height", "y"))
    assert tops == [0, heights[0] + knob_commands.GAP] and whole.attrib["viewBox"] == f"0 0 640 {tops[1] + heights[1]}"
    assert [text in (tmp_path / "both.svg").read_text() for text in ("loss", "norm", "rate")] == [True, True, False]


def test_results_keep_four_digits(knob_commands: Any) -> None:
    assert knob_commands.round_numbers({"loss": 1.23456, "interval": [0.000123456, 7], "end": "ended"}) == {
        "loss": 1.235, "interval": [0.0001235, 7], "end": "ended",
    }  # fmt: skip
