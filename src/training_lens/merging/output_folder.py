"""The folder that a command writes beside a run: where it may be, and what it may replace. Decided without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_lens.config.schema import ModelSection
from training_lens.errors import ConfigurationError
from training_lens.models.location import local_folder
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import read_json

SHOWN_NAMES = 3  # of files, in a message


@dataclass(frozen=True)
class OutputKind:
    """What a command writes into a folder; its report lists every file there."""

    report: str  # the report's file name
    made_by: str  # the command, as the report names it
    writer: str  # 'merge', in 'no merge wrote notes.txt'
    content: str  # 'a merged model', in 'the folder holds a merged model already'

    def list_marks(self, folder: Path) -> dict[str, Any]:
        """The part of the report of a finished `folder` by which `--force` later knows what it may replace."""
        return {"made_by": self.made_by, "files": sorted([*_list_files(folder), self.report])}

    def find_foreign_files(self, output: Path) -> list[str]:
        """Names of files in the folder (or of a file in its place) that no earlier report lists."""
        if not output.is_dir():
            return [output.name]
        try:
            report = read_json(output / self.report)
        except (OSError, ValueError):
            report = None
        ours = isinstance(report, dict) and report.get("made_by") == self.made_by
        return sorted(set(_list_files(output)) - set(report["files"] if ours else ()))


def protected_folders(run: RunFolder | None, adapter: Path, base: ModelSection) -> dict[str, Path]:
    """The folders that no output may touch, by what they hold: those of the run, of the adapter and of the base."""
    folders = {"the adapter": adapter}
    if run:
        names = ("tokenizer", "checkpoints", "logs", "metadata", "reports")
        folders |= {f"the run's {name}": getattr(run, name) for name in names} | {"the run's lens": run.root / "lens"}
    if stored := local_folder(base):
        folders["the base model"] = stored
    return folders


def check_output(output: Path, protected: Mapping[str, Path], kind: OutputKind, force: bool) -> None:
    """Refuse an output (a resolved path) that would cost files that the command did not write.

    Args:
        protected: folders that stay, see `protected_folders`.
        force: an earlier output of this kind may be replaced, if the command wrote every file that is there.

    Raises:
        ConfigurationError: it overlaps a protected folder, or holds other files already.
    """
    for what, folder in protected.items():
        there = folder.resolve()
        if there == output or there in output.parents or output in there.parents:
            way = "is" if there == output else "lies in" if there in output.parents else "holds"
            raise ConfigurationError(f"--output {output} {way} {what} ({there}), which stays. Give another folder.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    foreign = kind.find_foreign_files(output)
    if foreign:
        more = f" and {len(foreign) - SHOWN_NAMES} more" if len(foreign) > SHOWN_NAMES else ""
        raise ConfigurationError(
            f"--output {output}: no {kind.writer} wrote {', '.join(foreign[:SHOWN_NAMES])}{more}. Move that away, or "
            "give another folder."
        )
    if not force:
        raise ConfigurationError(f"{output} holds {kind.content} already. Give --force to replace it, or --output.")


def _list_files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]
