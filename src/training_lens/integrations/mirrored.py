"""What of a run's folder goes to a mirror, and copies of files that others write meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training_lens.core.capture_files import LISTING
from training_lens.integrations.remote import Content
from training_lens.runs.checkpoint_format import MANIFEST
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import TEMPORARY, hash_file, list_files

PRUNED = ("checkpoints/", "lens/")  # of what is deleted here, what is deleted there, too
WHOLE_LINES = (".jsonl", ".log")
Seen = Sequence[int | str]  # size, modification time in ns, sha256: of a file when it was sent


@dataclass(frozen=True)
class Copy:
    """A copy that stays as it is, at `path`, of the run's file `name`; `seen` is what that was then."""

    name: str
    path: Path
    content: Content
    seen: Seen


def files_but_checkpoints(run: RunFolder, *, running: bool) -> dict[str, Path]:
    """What goes to a mirror besides checkpoints, by name: no locks, nothing half-written, nothing of tracking/.

    What trackers keep there is this machine's: another one asks their services what they have. The list of captures
    waits for the end of the run: it must list nothing that is not there yet.
    """
    found = {path.relative_to(run.root).as_posix(): path for path in list_files(run.root)}
    if running:
        found.pop(f"{run.lens.name}/{LISTING}", None)
    return {name: path for name, path in sorted(found.items()) if _belongs(name)}


def files_of_checkpoint(run: RunFolder, folder: Path) -> dict[str, Path]:
    """The files of one checkpoint by their names in the run, its manifest last."""
    files = sorted(list_files(folder), key=lambda p: (p.name == MANIFEST, p))
    return {path.relative_to(run.root).as_posix(): path for path in files}


def _belongs(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(TEMPORARY) for part in parts) or parts[-1].endswith(".lock")
    return parts[0] not in ("checkpoints", "tracking") and not hidden


def trails(name: str) -> bool:
    """Whether a file changes also after the last delivery: it tells of that."""
    return name.startswith(("logs/run.log", "logs/events."))


def is_changed(path: Path, seen: Seen | None) -> bool:
    """Whether a file is another than it was.

    Raises:
        FileNotFoundError: it is gone.
    """
    facts = path.stat()
    return seen is None or [facts.st_size, facts.st_mtime_ns] != list(seen[:2])


def sizes_of_changed(files: Mapping[str, Path], seen: Mapping[str, Seen]) -> dict[str, int]:
    """The sizes in bytes of the files that are others than they were; those that vanish meanwhile are left out."""
    sizes = {}
    for name, path in files.items():
        try:
            if is_changed(path, seen.get(name)):
                sizes[name] = path.stat().st_size
        except FileNotFoundError:
            continue
    return sizes


def copies_of(files: Iterable[tuple[str, Path]], folder: Path) -> list[Copy]:
    """Copies in `folder` of the files, with their hashes; of those that vanish meanwhile, none."""
    copies = []
    for number, (name, path) in enumerate(files):
        try:
            facts = path.stat()
            copy = _frozen(path, folder / f"{number}{path.suffix}", grows=name.startswith("logs/"))
        except FileNotFoundError:
            continue
        content = Content(hash_file(copy), copy.stat().st_size)
        copies.append(Copy(name, copy, content, (facts.st_size, facts.st_mtime_ns, content.sha256)))
    return copies


def _frozen(path: Path, copy: Path, *, grows: bool) -> Path:
    """A second link to a file that is only ever replaced; of one that grows, its whole lines."""
    if grows:
        content = path.read_bytes()
        copy.write_bytes(content[: content.rfind(b"\n") + 1] if path.suffix in WHOLE_LINES else content)
        return copy
    try:
        os.link(path.resolve(strict=True), copy)
    except FileNotFoundError:
        raise
    except OSError:  # no links on this file system
        shutil.copyfile(path, copy)
    return copy
