"""The JSON files of a lens folder: lens.json says what its tables are about, files.json lists the capture files.

Readers notice by the list that a file was deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from training_lens.core.segments import TableSegment, list_segments, parse_segment_path
from training_lens.core.snapshots import list_snapshots, snapshot_step
from training_lens.core.types import DataType, LensManifest, ModuleRecord
from training_lens.errors import DamagedFileError, LensError
from training_lens.utils.integrity import read_sealed, write_sealed

LENS = "lens.json"
FORMAT = 1
LISTING = "files.json"


def write_manifest(folder: Path, manifest: LensManifest) -> None:
    """Write lens.json, whole or not at all."""
    plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(manifest).items()}
    write_sealed(folder / LENS, {**plain, "modules": [vars(module) for module in manifest.modules]})


def read_manifest(folder: Path) -> LensManifest:
    """Read lens.json.

    Raises:
        LensError: there is no lens.json, it is damaged, or it has another format.
    """
    path = folder / LENS
    if not path.is_file():
        raise LensError(
            f"{folder}: no captures ({LENS} is missing): the run was trained with lens.enabled=false, has not begun, "
            "or this is no run. Give the folder of a run that was trained with the lens."
        )
    try:
        values = read_sealed(path)
        if values["format"] != FORMAT:
            raise LensError(
                f"{path} has format {values['format']}; this version reads format {FORMAT}. Read it with the version "
                "of Training Lens that wrote it, or a later one."
            )
        modules = tuple(ModuleRecord(**module) for module in values["modules"])
        tables = {name: DataType(kind) for name, kind in values["tables"].items()}
        return LensManifest(**{**values, "modules": modules, "tables": tables})
    except (OSError, DamagedFileError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LensError(
            f"{path} is damaged ({type(error).__name__}: {error}); without it, the captures are lost."
        ) from error


def write_listing(folder: Path, captures: Iterable[Path]) -> None:
    """Write files.json, whole or not at all.

    A listed file must exist or be merged into another. So the writer lists a file after writing it, and takes it off
    the list before deleting it.
    """
    write_sealed(folder / LISTING, {"files": sorted(path.relative_to(folder).as_posix() for path in captures)})


def read_listing(folder: Path) -> list[Path]:
    """The files in files.json; none if an earlier version wrote the folder.

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
    """Write files.json without the captures after `last_step`, and return the remaining files that are missing.

    Raises:
        LensError: it is damaged.
    """
    kept = []
    for path in read_listing(folder):
        segment = parse_segment_path(path)
        first = segment.first if segment else snapshot_step(path)
        if segment and segment.first <= last_step:
            kept.append(TableSegment.from_range(path.parent, segment.first, min(segment.last, last_step)).path)
        elif first is not None and first <= last_step:
            kept.append(path)
    write_listing(folder, kept)
    return _find_missing(folder, kept)


def list_captures(folder: Path) -> list[Path]:
    """The segments and snapshots that are in a lens folder."""
    tables = [path for path in folder.iterdir() if path.is_dir()]
    segments = [segment.path for table in tables for segment in list_segments(table)]
    return segments + [path for table in tables for path in list_snapshots(table).values()]


def find_missing_captures(folder: Path) -> list[Path]:
    """The files in files.json that are gone; works while training runs.

    Raises:
        LensError: files.json is damaged.
    """
    missing = _find_missing(folder, read_listing(folder))
    listed = read_listing(folder) if missing else []  # the writer may have dropped some meanwhile
    return [path for path in missing if path in listed]


def describe_loss(path: Path) -> str:
    """What is lost with a missing file."""
    segment = parse_segment_path(path)
    lost = f"what was captured in the steps {segment.first}-{segment.last} is lost" if segment else "it is lost"
    return f"{path} is missing: {lost}"


def _find_missing(folder: Path, listed: Iterable[Path]) -> list[Path]:
    segments_by_table = {table: list_segments(table) for table in folder.iterdir() if table.is_dir()}
    return [path for path in listed if not _exists(path, segments_by_table.get(path.parent, []))]


def _exists(path: Path, segments: Iterable[TableSegment]) -> bool:
    """Whether a file exists, or was merged into another segment."""
    wanted = parse_segment_path(path)
    if wanted is None:
        return path.is_file()
    return any(segment.first <= wanted.first and wanted.last <= segment.last for segment in segments)
