"""The Python of the pages runs as printed, each page's blocks in their order."""

from __future__ import annotations

import ast
import re
import shutil
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import fork, redirect_to_files

from training_lens import TrainingConfig, TrainingWrapper, embedded

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if BLOCK.search(page.read_text(encoding="utf-8"))]
ELSEWHERE = ("s3://", "me/tiny", "openai")  # in blocks that need a service: only what they import is tried
NOT_HERE = ("openai",)  # no dependency of the project


@pytest.fixture(scope="session")
def place(make_once: Callable[..., Path]) -> Path:
    """A folder with what the pages speak of: path/to/model, rows.jsonl, and a run."""

    def make(folder: Path) -> None:
        (folder / "path/to").mkdir(parents=True)
        shutil.copytree(embedded.PATHS[embedded.MODEL], folder / "path/to/model")
        lines = embedded.PATHS[embedded.TRAIN].read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "rows.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
        data: Any = {"train": [str(folder / "rows.jsonl")], "val_ratio": 0.2}
        output: Any = {"base_output_dir": str(folder / "outputs")}
        TrainingWrapper(TrainingConfig(data=data, output=output, training={"max_steps": 4})).train()

    return make_once("pages", make)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_the_python_of_a_page_runs(page: Path, place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place, tmp_path / "place")
    process = fork(run_blocks, folder, BLOCK.findall(page.read_text(encoding="utf-8")))
    process.join()
    assert process.exitcode == 0, (folder / "stderr.txt").read_text()[-3000:]


def run_blocks(folder: Path, blocks: list[str]) -> None:
    import os

    os.chdir(folder)
    redirect_to_files()
    warnings.simplefilter("ignore")  # of the libraries that the pages use, at any time
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for block in blocks:
            exec(list_imports(block) if any(sign in block for sign in ELSEWHERE) else block, names)
    except BaseException:
        (folder / "stderr.txt").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)


def list_imports(block: str) -> str:
    statements = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(
        text
        for node in statements
        if not (text := ast.unparse(node)).startswith(tuple(f"from {name}" for name in NOT_HERE))
    )
