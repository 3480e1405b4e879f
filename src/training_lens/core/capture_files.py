"""files.json, the list of the captures in a lens folder: by it readers notice one that was deleted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from training_lens.core.segments import TableSegment, list_segments, parse_segment_path
from training_lens.core.snapshots import list_snapshots, snapshot_step
from training_lens.errors import DamagedFileError, LensError
from training_lens.utils.integrity import read_sealed, write_sealed

LISTING = "files.json"


def write_listing(folder: Path, captures: Iterable[Path]) -> None:
    """Write files.json, whole or not at all.

    Each file in it must be in the folder as long as it is listed, or be merged into another: the writer lists a file
    after it wrote it, and before it deletes it.
    """
    write_sealed(folder / LISTING, {"files": sorted(path.relative_to(folder).as_posix() for path in captures)})


def read_listing(folder: Path) -> list[Path]:
    """The captures that files.json lists; none where an earlier version wrote the folder.

    Raises:
        LensError: it is damaged.
    """
    path = folder / LISTING
    try:
        names = read_sealed(path)["files"] if path.is_file() else []
    except (OSError, DamagedFileError, KeyError) as error:
        raise LensError(f"{path} is damaged ({error}): whether captures are missing is not known") from error
    return [folder / name for name in names]


def truncate_listing(folder: Path, last_step: int) -> list[Path]:
    """Write files.json without the captures behind `last_step`, and give those of the rest that are missing.

    Raises:
        LensError: it is damaged.
    """
    kept = [cut for path in read_listing(folder) if (cut := _truncated_path(path, last_step))]
    write_listing(folder, kept)
    return _find_missing(folder, kept)


def list_captures(folder: Path) -> list[Path]:
    """The segments and snapshots that are in a lens folder."""
    tables = [path for path in folder.iterdir() if path.is_dir()]
    segments = [segment.path for table in tables for segment in list_segments(table)]
    return segments + [path for table in tables for path in list_snapshots(table).values()]


def find_missing_captures(folder: Path) -> list[Path]:
    """The captures that files.json lists and that are gone; also while training runs.

    Raises:
        LensError: files.json is damaged.
    """
    missing = _find_missing(folder, read_listing(folder))
    listed = read_listing(folder) if missing else []  # what the writer dropped meanwhile is listed no longer
    return [path for path in missing if path in listed]


def describe_loss(path: Path) -> str:
    """What a reader lacks without a file of captures."""
    segment = parse_segment_path(path)
    lost = f"what was captured in the steps {segment.first}-{segment.last} is lost" if segment else "it is lost"
    return f"{path} is missing: {lost}"


def _find_missing(folder: Path, listed: Iterable[Path]) -> list[Path]:
    there = {table: list_segments(table) for table in folder.iterdir() if table.is_dir()}
    return [path for path in listed if not _is_there(path, there.get(path.parent, []))]


def _is_there(path: Path, segments: Iterable[TableSegment]) -> bool:
    """Whether a file is there, or its steps are in a segment that it was merged into."""
    wanted = parse_segment_path(path)
    if wanted is None:
        return path.is_file()
    return any(segment.first <= wanted.first and wanted.last <= segment.last for segment in segments)


def _truncated_path(path: Path, last_step: int) -> Path | None:
    """The path under which a file is kept when all steps behind `last_step` are dropped; None: it is dropped."""
    segment = parse_segment_path(path)
    first = segment.first if segment else snapshot_step(path)
    if first is None or first > last_step:
        return None
    return TableSegment.from_range(path.parent, segment.first, min(segment.last, last_step)).path if segment else path
