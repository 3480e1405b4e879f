"""Tags, size and deletion of a run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.run_folder import RunFolder, read_checked_json
from training_lens.runs.run_lookup import read_status
from training_lens.utils.files import TEMPORARY, sweep_temporaries, write_json
from training_lens.utils.names import require_contained

DELETED = f"{TEMPORARY}deleted-"
TAG = re.compile(r"[\w.:-]{1,40}")


def output_folder(folder: Path) -> Path | None:
    """The output.base_output_dir that contains the folder of a run or sweep; None if it is elsewhere."""
    folder = folder.absolute()
    if is_in_place(RunFolder(folder)):
        return folder.parents[3]
    return folder.parents[1] if folder.parent.name == "sweeps" and ".." not in folder.parts else None


def is_in_place(folder: RunFolder) -> bool:
    """Whether a run's folder is at .../experiments/NAME/runs/ID."""
    parts = folder.root.absolute().parts
    return parts[-4:-3] == ("experiments",) and parts[-2] == "runs" and ".." not in parts


def read_tags(folder: RunFolder) -> tuple[str, ...]:
    """The run's tags, in the order in which they were added."""
    path = folder.metadata / "tags.json"
    tags = read_checked_json(path) if path.is_file() else []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise CheckpointError(f"{path} holds no list of texts. Delete it, and tag the run again.")
    return tuple(tags)


def change_tags(folder: RunFolder, tags: Sequence[str], *, remove: bool = False) -> tuple[str, ...]:
    """Add tags to a run, or remove them. Returns the run's tags afterwards.

    Raises:
        ConfigurationError: a tag has a bad form, or one to remove is not among the run's tags.
    """
    require_contained(folder.metadata)
    before = read_tags(folder)
    if remove:
        found = f"has {', '.join(before)}" if before else "has no tags"
        problems = [f"tag '{tag}': the run {folder.run_id} {found}." for tag in tags if tag not in before]
    else:
        form = "give at most 40 letters, digits and '_.:-', without spaces"
        problems = [f"tag {tag!r}: {form}." for tag in tags if not TAG.fullmatch(tag)]
    if problems:
        raise ConfigurationError(problems)
    after = tuple(tag for tag in before if tag not in tags) if remove else tuple(dict.fromkeys((*before, *tags)))
    write_json(folder.metadata / "tags.json", list(after))
    return after


def measure_size(folder: RunFolder) -> int:
    """The bytes of a run's files. The targets of symbolic links are not counted."""
    return sum(path.lstat().st_size for path in folder.root.rglob("*") if path.is_symlink() or path.is_file())


def check_deletable(folder: RunFolder) -> None:
    """Check that a folder may be deleted: a run in its place that no process trains.

    Raises:
        CheckpointError: the folder is a link, is not where runs are, or a process trains it.
    """
    root = folder.root.absolute()
    if root.is_symlink() or folder.metadata.is_symlink():
        raise CheckpointError(f"{root} is a symbolic link, or contains one at metadata; delete it by hand.")
    if not is_in_place(folder):
        raise CheckpointError(f"{root} is not in .../experiments/NAME/runs/, where runs are; delete it by hand.")
    if linked := [path for path in (root.parent, root.parent.parent) if path.is_symlink()]:
        raise CheckpointError(
            f"{root} is elsewhere: {linked[0]} is a symbolic link to {linked[0].resolve()}; delete it by hand."
        )
    folder.require_free()
    if read_status(folder) == "running":
        raise CheckpointError(
            f"the run {folder.run_id} says that it is running ({folder.process_label}), and its lock cannot be tried. "
            f"Stop it first, or delete it by hand. It is in {root}."
        )


def delete_run(folder: RunFolder) -> None:
    """Delete a run, see `check_deletable`. It is renamed first, so that a kill leaves no partial run."""
    check_deletable(folder)
    root = folder.root.absolute()
    sweep_temporaries(root.parent, 0, DELETED)  # what a killed deletion left
    doomed = root.with_name(f"{DELETED}{root.name}")
    with folder.hold_lock():
        root.rename(doomed)
    shutil.rmtree(doomed)
