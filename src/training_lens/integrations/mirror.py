"""The mirror: copies a run's folder to another place while it trains."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from training_lens.core.capture_files import LISTING
from training_lens.errors import CheckpointError, ConfigurationError, IntegrationError
from training_lens.integrations.delivery import Cursor, Integration
from training_lens.integrations.mirror_manifest import MANIFEST, FileDigest, MirrorManifest, RemoteRun
from training_lens.integrations.record import RunRecord
from training_lens.integrations.storage import LocalStorage, open_storage
from training_lens.runs import checkpoint_format
from training_lens.runs.checkpoint_format import list_checkpoints
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import TEMPORARY, hash_file, list_files, temporary_prefix
from training_lens.utils.formatting import format_size, pluralize
from training_lens.utils.logging import get_logger
from training_lens.utils.names import check_experiment, check_run_id

logger = get_logger(__name__)
EVERY = 30.0  # seconds between two passes, and two updates of mirror.json; a new checkpoint is sent at once
SCANS = 3  # passes of one delivery, while files vanish: the lens merges and thins its files
PRUNED = ("checkpoints/", "lens/")  # files that are deleted in the mirror when they are deleted here
WHOLE_LINES = (".jsonl", ".log")
CHANGED_AFTER_END = ("logs/run.log", "logs/events.")  # files that log the last delivery
FileStamp = Sequence[int | str]  # size, modification time in ns and sha256 of a file when it was sent


class MirrorIntegration(Integration):
    """Copies a run to output.mirror: verifies each file by its hash, sends checkpoints last, then writes mirror.json.

    Only complete content is sent: checkpoints and adapters are written atomically, and journals are cut after their
    last whole line. Files that the mirror has, by size and mirror.json, are not sent again.
    """

    name = "mirror"

    def __init__(self, run: RunRecord) -> None:
        self.run = run
        self.cursor = Cursor(run.tracking_folder(self.name) / "cursor.json")
        self._place = str(run.config.output.mirror)
        self._there: dict[str, FileDigest] | None = None  # verified files in the mirror; None: not known yet
        self._unlisted: dict[str, int] = {}  # sizes of files in the mirror that no manifest lists
        self._seen: dict[str, FileStamp] = {}
        self._version = ""
        self._passed = self._published = 0.0  # times of the last pass, and of the last mirror.json
        self._checkpoints: list[Path] = []

    def require(self) -> None:
        try:
            check_run_id(self.run.run_id), check_experiment(self.run.experiment)
        except ConfigurationError as error:  # a name of an earlier version
            raise IntegrationError(f"output.mirror: {error}. Rename the run's folder.", lasting=True) from error
        storage, home = self._remote_run.storage, self.run.folder.root.resolve()
        if isinstance(storage, LocalStorage) and (storage.folder / self._remote_run.path).resolve() == home:
            raise IntegrationError(
                f"output.mirror: {self._place} is where the run itself is kept. Give another folder.", lasting=True
            )

    def deliver(self, ended: bool) -> None:
        has_new_checkpoint = list_checkpoints(self.run.folder.checkpoints) != self._checkpoints
        is_due = self._there is None or has_new_checkpoint or time.monotonic() - self._passed >= EVERY
        if not (ended or is_due):
            return
        try:
            if self._there is None:
                self._there = self._find_present()
            status = self.run.status if ended else "running"
            for _ in range(SCANS):
                if self._run_pass(self._there, status):
                    break
        except BaseException:
            self._there = None
            raise
        self._passed = time.monotonic()

    def outstanding(self) -> str:
        kept = self._load_cursor()
        ends, groups = kept.get("status") == self.run.status, self._list_groups(self.run.status)
        sizes = list_changed_sizes({n: p for group in groups for n, p in group.items()}, kept.get("files", {}))
        new = [size for name, size in sizes.items() if not (ends and name.startswith(CHANGED_AFTER_END))]
        files = [f"{pluralize(len(new), 'file')} ({format_size(sum(new))})"] if new else []
        return ", ".join([*files, *([] if ends else ["its end"])])

    @cached_property
    def _remote_run(self) -> RemoteRun:
        path = f"experiments/{self.run.experiment}/runs/{self.run.run_id}"
        return RemoteRun(open_storage(self._place), path)

    def _load_cursor(self) -> dict[str, Any]:
        """The cursor's values, if they are of this place."""
        kept = self.cursor.load()
        return kept if kept.get("place") == self._place else {}

    def _find_present(self) -> dict[str, FileDigest]:
        """The files that the mirror has as its manifest says; refused if another copy of this run has written there."""
        remote, kept = self._remote_run, self._load_cursor()
        known: Mapping[str, FileDigest] = {}
        self._seen, self._version = dict(kept.get("files", {})), ""
        if remote.storage.exists(remote.storage_name(MANIFEST)):
            try:
                manifest = remote.read_manifest()
            except CheckpointError as error:
                logger.warning("mirror: %s All files are compared.", error)
            else:
                here = (platform.node(), str(self.run.folder.root.resolve()))
                if manifest.version not in kept.get("versions", ()) and (manifest.host, manifest.folder) != here:
                    raise IntegrationError(
                        f"{remote.place} was written by another copy of this run, on host {manifest.host} at "
                        f"{manifest.updated}, and stays as it is. Give another output.mirror to keep this copy, too.",
                        lasting=True,
                    )
                known = {name: content for name, content in manifest.files.items() if name not in manifest.replacing}
                self._version = manifest.version
        sizes = remote.list_files()
        there = {name: content for name, content in known.items() if sizes.get(name) == content.size}
        self._unlisted = {name: size for name, size in sizes.items() if name not in there}
        return there

    def _list_groups(self, status: str) -> list[dict[str, Path]]:
        """The files to mirror in groups: each checkpoint is one, with its manifest last, and comes after the others.

        Checkpoints are listed first, so that all other files are at least as new.
        """
        run = self.run.folder
        checkpoints = list_checkpoints(run.checkpoints)
        groups = [list_other_files(run, running=status == "running")]
        for folder in checkpoints:
            files = sorted(list_files(folder), key=lambda path: (path.name == checkpoint_format.MANIFEST, path))
            groups.append({path.relative_to(run.root).as_posix(): path for path in files})
        return groups

    def _run_pass(self, there: dict[str, FileDigest], status: str) -> bool:
        """One pass over the run's folder; returns whether every listed file still existed when it was sent."""
        self._checkpoints = list_checkpoints(self.run.folder.checkpoints)
        groups = self._list_groups(status)
        sent = [self._send_group(group, there, status) for group in groups]
        whole = all(sent)
        local = {name for group in groups for name in group}
        gone = [n for n in (*there, *self._unlisted) if n.startswith(PRUNED) and n not in local] if whole else []
        for name in gone:
            there.pop(name, None)
        self._write_manifest(there, status)
        for name in gone:  # the manifest no longer lists them
            self._remote_run.storage.delete(self._remote_run.storage_name(name))
            self._unlisted.pop(name, None)
        return whole

    def _send_group(self, group: Mapping[str, Path], there: dict[str, FileDigest], status: str) -> bool:
        """Send the files that differ from the mirror's; returns whether all of them still existed here."""
        home = self.run.tracking_folder(self.name)
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=temporary_prefix(home), dir=home) as folder:
            new = [
                (name, path)
                for name, path in group.items()
                if name not in there
                or there[name].sha256 != self._seen.get(name, (0, 0, ""))[2]
                or is_changed(path, self._seen[name])
            ]
            copies = make_copies(new, Path(folder))
            self._send_copies([copy for copy in copies if there.get(copy.name) != copy.content], there, status)
            self._seen |= {copy.name: copy.seen for copy in copies}
            return len(copies) == len(new)

    def _send_copies(self, copies: Sequence[FileCopy], there: dict[str, FileDigest], status: str) -> None:
        """Send copies and verify them. Overwritten files are announced first, so that readers accept either content."""
        storage = self._remote_run.storage
        replacing = {copy.name: copy.content for copy in copies if copy.name in there}
        if replacing:
            self._write_manifest(there, status, replacing)
        for copy in copies:
            name = self._remote_run.storage_name(copy.name)
            may_be_there = self._unlisted.pop(copy.name, None) == copy.content.size  # sent by an interrupted pass
            if not (may_be_there and storage.verify(name, copy.path)):
                storage.put_file(copy.path, name)
                if not storage.verify(name, copy.path):
                    raise IntegrationError(f"{self._remote_run.place}/{copy.name}: what arrived is not what was sent.")
            there[copy.name] = copy.content
            replacing.pop(copy.name, None)
            if time.monotonic() - self._published >= EVERY:  # a sign of life, and all that a kill costs
                self._write_manifest(there, status, replacing)

    def _write_manifest(
        self, there: Mapping[str, FileDigest], status: str, replacing: Mapping[str, FileDigest] | None = None
    ) -> None:
        """Write mirror.json; its version is saved first, so that after a kill it is still known as ours."""
        before, self._version = self._version, secrets.token_hex(8)
        kept = {"place": self._place, "versions": [before, self._version]}
        self.cursor.save(self._load_cursor() | kept)
        self._remote_run.write_manifest(
            MirrorManifest(
                run_id=self.run.run_id,
                experiment=self.run.experiment,
                status=status,
                host=platform.node(),
                folder=str(self.run.folder.root.resolve()),
                updated=datetime.now(UTC).isoformat(timespec="seconds"),
                version=self._version,
                files=dict(sorted(there.items())),
                replacing=replacing or {},
            )
        )
        self._published = time.monotonic()
        self.cursor.save({**kept, "status": status, "files": self._seen})


@dataclass(frozen=True)
class FileCopy:
    """An unchanging copy at `path` of the run's file `name`; `seen` is the file's stamp when it was copied."""

    name: str
    path: Path
    content: FileDigest
    seen: FileStamp


def list_other_files(run: RunFolder, *, running: bool) -> dict[str, Path]:
    """The files to mirror besides checkpoints, by name: without locks, temporary files, and tracking/.

    The cursors in tracking/ are of this machine: another machine asks the services what they have. The list of captures
    is sent at the end of the run, when all that it lists has been sent.
    """
    found: dict[str, Path] = {}
    for path in sorted(list_files(run.root)):
        parts = path.relative_to(run.root).parts
        is_hidden = path.suffix == ".lock" or any(part.startswith(TEMPORARY) for part in parts)
        if parts[0] not in ("checkpoints", "tracking") and not is_hidden:
            found["/".join(parts)] = path
    if running:
        found.pop(f"{run.lens.name}/{LISTING}", None)
    return found


def is_changed(path: Path, seen: FileStamp | None) -> bool:
    """Whether a file has changed since it was seen, or is gone."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return True
    return seen is None or [facts.st_size, facts.st_mtime_ns] != list(seen[:2])


def list_changed_sizes(files: Mapping[str, Path], seen: Mapping[str, FileStamp]) -> dict[str, int]:
    """The sizes in bytes of the files that have changed, without those that vanish meanwhile."""
    sizes = {}
    for name, path in files.items():
        if is_changed(path, seen.get(name)):
            with suppress(FileNotFoundError):
                sizes[name] = path.stat().st_size
    return sizes


def make_copies(files: Iterable[tuple[str, Path]], folder: Path) -> list[FileCopy]:
    """Copies of the files in `folder`, with their hashes, without those that vanish meanwhile.

    Of a file that grows, the whole lines are copied; one that is only ever replaced is hard-linked.
    """
    copies = []
    for number, (name, path) in enumerate(files):
        copy = folder / f"{number}{path.suffix}"
        try:
            facts = path.stat()
            if name.startswith("logs/"):
                lines = path.read_bytes()
                copy.write_bytes(lines[: lines.rfind(b"\n") + 1] if path.suffix in WHOLE_LINES else lines)
            else:
                _link_or_copy(path, copy)
        except FileNotFoundError:
            continue
        content = FileDigest(hash_file(copy), copy.stat().st_size)
        copies.append(FileCopy(name, copy, content, (facts.st_size, facts.st_mtime_ns, content.sha256)))
    return copies


def _link_or_copy(path: Path, copy: Path) -> None:
    try:
        os.link(path.resolve(strict=True), copy)
    except FileNotFoundError:
        raise
    except OSError:  # no hard links on this file system
        shutil.copyfile(path, copy)
