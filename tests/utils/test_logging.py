"""The log: what a screen shows, and what a run's file keeps."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from training_lens.utils.logging import TrainingLogger, get_logger, quiet_screen, setup_logging


def test_a_quiet_screen_shows_warnings_alone_and_the_file_keeps_all(tmp_path: Path) -> None:
    screen = io.StringIO()
    setup_logging(Console(file=screen, width=80))
    logger = get_logger("example")
    with quiet_screen(), TrainingLogger(tmp_path / "run.log"):
        logger.info("a step")
        logger.warning("look here")
    logger.info("afterwards")
    assert screen.getvalue() == "look here\nafterwards\n"  # a file takes lines as they are: no padding
    assert "a step" in (tmp_path / "run.log").read_text()
