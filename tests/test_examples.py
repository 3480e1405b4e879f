"""The notebooks of examples/ run as they are, and what is committed of their outputs is fit to be read."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
OF_A_MACHINE = re.compile(r"/(tmp|home|work|root|Users|usr)/|site-packages|\x1b|Warning")
one_by_one = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: Any) -> list[list[tuple[str, list[str]]]]:
    """What kinds of output each cell left."""
    return [[(o.output_type, sorted(o.get("data", {}))) for o in cell.outputs] for cell in code_cells(notebook)]


@one_by_one
def test_outputs_are_committed_without_errors_or_traces_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell.outputs]
    assert shown and all(output.output_type != "error" and output.get("name") != "stderr" for output in shown)
    assert not [found for output in shown if (found := OF_A_MACHINE.search(str(output)))]


@one_by_one
def test_cells_are_sound_python_and_links_lead_somewhere(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            assert (path.parent / target).exists(), target


@pytest.mark.slow
@one_by_one
def test_notebooks_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that fails raises; each leaves the kinds of output that are committed."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sys.modules.pop("notebooks", None)
    from notebooks import cleaned, executed  # type: ignore[import-not-found]

    assert kinds(cleaned(executed(path))) == kinds(nbformat.read(path, as_version=4))
