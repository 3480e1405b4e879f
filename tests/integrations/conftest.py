"""A hub on this machine, and what a process needs to use it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub

from training_lens.utils.runs import RunFolder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub, for this process and those it starts; logged in with a token that may write."""
    from huggingface_hub import constants

    server = Hub(tmp_path / "hub").start()
    environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # read from the environment once, at import
    place = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.kill()


@pytest.fixture
def own_run(finished_run: Any, tmp_path: Path) -> RunFolder:
    """A copy of the finished run, to write in."""
    return RunFolder(Path(shutil.copytree(finished_run.root, tmp_path / "runs" / finished_run.run_id)))
