"""lens.json, which says what the tables of a lens folder are about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from training_lens.core.types import DataType, LensManifest, ModuleRecord
from training_lens.errors import DamagedFileError, LensError
from training_lens.utils.integrity import read_sealed, write_sealed

LENS = "lens.json"
FORMAT = 1


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
