"""Where a merge may write: never where it would cost files that no merge wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training_lens.config.schema import ModelSection
from training_lens.errors import ConfigurationError
from training_lens.merging.merged_folder import REPORT
from training_lens.models.stored import local_folder
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import read_json

MADE_BY = "training-lens merge"
SHOWN = 3  # names of files in a message


def marks(folder: Path) -> dict[str, Any]:
    """What the report in a finished `folder` says besides, by which `--force` knows later what it may replace."""
    return {"made_by": MADE_BY, "files": sorted([*_names(folder), REPORT])}


def check_place(output: Path, run: RunFolder | None, adapter: Path, base: ModelSection, force: bool) -> None:
    """Refuse an output, a resolved path, in which something is in the way.

    Args:
        run: what is merged, `adapter` its folder, and `base` what it is merged into.
        force: whether an earlier merge may be replaced, where it wrote every file that is there.

    Raises:
        ConfigurationError: it would touch the run's, the adapter's or the base's files; or holds others already.
    """
    for what, folder in _kept(run, adapter, base).items():
        there = folder.resolve()
        if there == output or there in output.parents or output in there.parents:
            way = "is" if there == output else "lies in" if there in output.parents else "holds"
            raise ConfigurationError(f"--output {output} {way} {what} ({there}), which stays. Give another folder.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    foreign = _foreign(output)
    if foreign:
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise ConfigurationError(
            f"--output {output}: no merge wrote {', '.join(foreign[:SHOWN])}{more}. Move that away, or give another "
            "folder."
        )
    if not force:
        raise ConfigurationError(f"{output} holds a merged model already. Give --force to replace it, or --output.")


def _kept(run: RunFolder | None, adapter: Path, base: ModelSection) -> dict[str, Path]:
    """Folders that are no merge's to write, by what they are."""
    kept = {"the adapter": adapter}
    if run:
        names = ("tokenizer", "checkpoints", "logs", "metadata", "reports")
        kept |= {f"the run's {name}": getattr(run, name) for name in names} | {"the run's lens": run.root / "lens"}
    stored = local_folder(base)
    return kept | ({"the base model": stored} if stored else {})


def _foreign(output: Path) -> list[str]:
    """Names in the folder, or its own, that the report of no earlier merge lists."""
    if not output.is_dir():
        return [output.name]
    try:
        report = read_json(output / REPORT)
    except (OSError, ValueError):
        report = None
    ours = isinstance(report, dict) and report.get("made_by") == MADE_BY
    return sorted(set(_names(output)) - set(report["files"] if ours else ()))


def _names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]
