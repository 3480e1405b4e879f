"""A heat map as a small SVG: a labelled grid of numbers, blue below 0 and orange above."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from training_lens.display.colors import ALARM, COLOURS, GRID, INK

CELL_WIDTH, CELL_HEIGHT, TOP, LETTER = 48, 22, 26, 7  # pixels; of a letter of 12 pixels at most
STRONGEST = 0.9  # opacity of the largest number's cell
DARK = 0.6  # opacity from which a cell's number is white


def render_heat_map(
    rows: Sequence[str], columns: Sequence[str], values: np.ndarray, form: str = "{:.1f}", titles: str = "{} {}: {}"
) -> str:
    """The SVG of `values` (rows, columns), each with its number; a NaN leaves its cell empty.

    Args:
        form: of a number in its cell; `titles`: of the text that a mouse over the cell shows, given its row, column
            and number.
    """
    left = 12 + LETTER * max(map(len, rows), default=0)
    width, height = left + CELL_WIDTH * len(columns) + 4, TOP + CELL_HEIGHT * len(rows) + 4
    known = np.abs(values[np.isfinite(values)])
    largest = float(known.max()) if known.size and known.max() > 0 else 1.0
    parts = [_render_label(left + CELL_WIDTH * (j + 0.5), TOP - 8, name, "middle") for j, name in enumerate(columns)]
    for i, name in enumerate(rows):
        down = TOP + CELL_HEIGHT * i
        parts.append(_render_label(left - 6, down + 15, name, "end"))
        for j, column in enumerate(columns):
            if np.isfinite(values[i, j]):
                number = form.format(values[i, j])
                cell = _render_cell(left + CELL_WIDTH * j, down, float(values[i, j]) / largest, number)
                parts.append(f"<g><title>{escape(titles.format(name, column, number))}</title>{cell}</g>")
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" style="max-width: 100%; height: auto" role="img" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def _render_cell(across: float, down: float, strength: float, number: str) -> str:
    """A cell whose colour is as strong as `strength`, from -1 to 1."""
    opacity, colour = STRONGEST * abs(strength), COLOURS[0] if strength < 0 else ALARM
    box = (
        f'<rect x="{across:.0f}" y="{down}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" fill="{colour}" '
        f'fill-opacity="{opacity:.3f}" stroke="{GRID}"/>'
    )
    ink = "#fff" if opacity > DARK else "currentColor"
    middle = across + CELL_WIDTH / 2 - 1
    return (
        f'{box}<text x="{middle:.0f}" y="{down + 14}" text-anchor="middle" font-size="11" fill="{ink}">{number}</text>'
    )


def _render_label(across: float, down: float, words: str, anchor: str) -> str:
    return f'<text x="{across:.0f}" y="{down}" text-anchor="{anchor}" fill="{INK}">{escape(words)}</text>'
