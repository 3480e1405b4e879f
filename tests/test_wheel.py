"""The wheel holds the package as it is, and nothing else; `make wheel-test` installs and uses it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
NEEDED = """py.typed config/presets/config.yaml config/presets/experiment/quick_test.yaml embedded/train.jsonl
embedded/base/model.safetensors embedded/base/tokenizer.json models/fast/native/kernels.c models/fast/native/kernels.h
integrations/model_card.md.jinja""".split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*") if path.is_file()}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name for name in files if "__pycache__" not in name}
    assert {f"training_lens/{name}" for name in NEEDED} <= held


def test_it_brings_its_command_and_licence(wheel: zipfile.ZipFile) -> None:
    facts = {name.partition(".dist-info/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "training-lens = training_lens.cli:main" in wheel.read(facts["entry_points.txt"]).decode()
    assert facts["licenses/LICENSE"] and "Requires-Dist: torch>=" in wheel.read(facts["METADATA"]).decode()
