"""Runs the notebooks of examples/ and writes them back with what they showed: python tools/notebooks.py [NAME...].

Each runs in an empty folder of its own. What tells nothing of the notebook is left out: times of cells, the kernel's
version, and what libraries write to standard error (their bars and warnings), which goes to the screen.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
CELL_SECONDS = 300
VERBOSITY = "TRANSFORMERS_VERBOSITY"  # what the HF Trainer shows depends on it
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> Any:
    """The notebook (nbformat's NotebookNode) with the outputs of a new kernel.

    Raises:
        CellExecutionError: a cell failed; shows which, and its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=resources, record_timing=False
        )
        client.execute(env={name: value for name, value in os.environ.items() if name != VERBOSITY})
    return notebook


def cleaned(notebook: Any) -> Any:
    """The notebook without what tells nothing; outputs and sources stay."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = _joined(output for output in cell.outputs if output.get("name") != "stderr")
    return notebook


def _joined(outputs: Iterable[Any]) -> list[Any]:
    """With what was printed in one go as one output: where a kernel cuts it is chance."""
    kept: list[Any] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def noise(notebook: Any) -> str:
    """What the cells wrote to standard error."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stderr")


def main(names: list[str]) -> None:
    for path in [EXAMPLES / name for name in names] or sorted(EXAMPLES.glob("*.ipynb")):
        notebook = executed(path)
        print(noise(notebook), file=sys.stderr)
        nbformat.write(cleaned(notebook), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
