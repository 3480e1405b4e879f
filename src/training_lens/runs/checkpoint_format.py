"""The format of checkpoints: folders `step-00000200` with a manifest of every file's sha256, written atomically.

What goes into one is decided in `training/loop/checkpoint_manager.py`; here it is written, verified and listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from training_lens.errors import CheckpointError, DamagedFileError
from training_lens.utils.files import atomic_folder, hash_file
from training_lens.utils.integrity import find_damaged_files, read_sealed, write_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class CheckpointMetadata:
    """A checkpoint's manifest: its step, validation loss (nats per supervised token) and the sha256 of its files."""

    step: int
    validation_loss: float | None
    data_fingerprint: str
    files: dict[str, str]
    format: int = FORMAT


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def write_checkpoint(
    checkpoints: Path, step: int, validation_loss: float | None, data_fingerprint: str, fill: Callable[[Path], object]
) -> Path:
    """Write one checkpoint atomically. `fill` writes its files into a folder that is renamed when complete.

    Raises:
        CheckpointError: it cannot be written, for example because the disk is full; nothing of it remains.
    """
    from safetensors import SafetensorError

    target = checkpoint_folder(checkpoints, step)
    try:
        with atomic_folder(target) as folder:
            fill(folder)
            files = {str(f.relative_to(folder)): hash_file(f) for f in sorted(folder.rglob("*")) if f.is_file()}
            manifest = CheckpointMetadata(step, validation_loss, data_fingerprint, files)
            write_sealed(folder / MANIFEST, asdict(manifest), verbatim=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint after step {step} cannot be written in {checkpoints}: {error}. "
            "Free some space there, then continue with --resume."
        ) from error
    return target


def verify_checkpoint(folder: Path) -> CheckpointMetadata:
    """Read the manifest and compare every file with its sha256; raises a `CheckpointError` if one differs."""
    try:
        metadata = CheckpointMetadata(**read_sealed(folder / MANIFEST))
    except (OSError, DamagedFileError, TypeError) as error:
        raise CheckpointError(f"{folder}: its {MANIFEST} cannot be read ({error}).") from error
    if metadata.format != FORMAT:
        raise CheckpointError(f"{folder} has format {metadata.format}; this version reads format {FORMAT}.")
    if damaged := next(find_damaged_files(folder), None):
        raise CheckpointError(f"{damaged} in its {MANIFEST}.")
    return metadata


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoint folders, oldest first. They are not verified."""
    return sorted(p for p in checkpoints.glob("step-*") if p.is_dir())


def list_checkpoint_steps(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints in a folder, oldest first."""
    names = (path.name.removeprefix("step-") for path in list_checkpoints(checkpoints))
    return [int(name) for name in names if name.isdigit()]


def newest_intact_checkpoint(checkpoints: Path) -> tuple[Path, CheckpointMetadata] | None:
    """The newest intact checkpoint. Damaged ones are skipped with a warning."""
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            return folder, verify_checkpoint(folder)
        except CheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
    return None
