"""A checkpoint is whole and verified, or passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_lens.errors import CheckpointError
from training_lens.runs.checkpoint_format import (
    list_checkpoints,
    newest_intact_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)


def write(folder: Path, step: int) -> Path:
    def fill(target: Path) -> None:
        (target / "adapter").mkdir()
        (target / "adapter/weights").write_text(f"weights {step}")

    return write_checkpoint(folder, step, 1.5, "data", fill)


def test_written_and_verified(tmp_path: Path) -> None:
    metadata = verify_checkpoint(write(tmp_path, 7))
    assert (metadata.step, metadata.validation_loss, metadata.data_fingerprint) == (7, 1.5, "data")
    assert list(metadata.files) == ["adapter/weights"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "adapter/weights").write_text("other"), "differs from the sha256"),
        (lambda c: (c / "adapter/weights").unlink(), "adapter/weights is missing"),
        (lambda c: (c / "manifest.json").write_text("{"), r"manifest.json cannot be read"),
        (lambda c: (c / "manifest.json").unlink(), r"manifest.json cannot be read"),
    ],
)
def test_damage_is_found_and_the_older_one_taken(tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 20)
    damage(newest)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(newest)
    found = newest_intact_checkpoint(tmp_path)
    assert found is not None and found[1].step == 1


def test_a_failed_write_is_no_checkpoint(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match="disk full"):
        write_checkpoint(tmp_path, 1, None, "data", fail)
    assert (
        list_checkpoints(tmp_path) == []
        and list(tmp_path.iterdir()) == []
        and newest_intact_checkpoint(tmp_path) is None
    )
