"""A run in a mirror, and mirror.json, which lists what the mirror holds of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from training_lens.errors import CheckpointError
from training_lens.integrations.storage import StorageBackend
from training_lens.utils.file_schemas import find_type_error
from training_lens.utils.files import read_json, write_json
from training_lens.utils.names import check_experiment, check_run_id, find_name_fault

MANIFEST = "mirror.json"
FORMAT = 1
STATUSES = ("running", "finished", "failed", "pruned", "interrupted", "unknown")
SHA256 = re.compile(r"[0-9a-f]{64}")
ALIVE_SECONDS = 120.0  # since the last sign of life, after which a run that says `running` is thought to be dead


@dataclass(frozen=True)
class FileDigest:
    """What a file holds."""

    sha256: str
    size: int

    def check_values(self) -> None:
        """Refuse what is no hash or no size.

        Raises:
            TypeError, ValueError: says which.
        """
        if not isinstance(self.sha256, str) or not SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self.sha256!r} is no sha256")
        if type(self.size) is not int or not 0 <= self.size < 2**63:
            raise ValueError(f"{self.size!r} is no size in bytes")


@dataclass(frozen=True)
class MirrorManifest:
    """mirror.json: what a mirrored run holds, written after the files that it lists.

    Args:
        status: of the run: running, finished, failed, pruned or interrupted.
        host: that wrote it, from the run's `folder`; `updated`: when (UTC).
        version: another one at each writing.
        replacing: files that are being written over: until the next manifest, they hold this or what `files` says.
    """

    run_id: str
    experiment: str
    status: str
    host: str
    folder: str
    updated: str
    version: str
    files: Mapping[str, FileDigest]
    replacing: Mapping[str, FileDigest] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def seconds_old(self) -> float:
        return (datetime.now(UTC) - datetime.fromisoformat(self.updated)).total_seconds()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(content.size for content in self.files.values())

    @property
    def status_now(self) -> str:
        """`status`; interrupted where the run says `running`, and nothing was heard of it for `ALIVE_SECONDS`."""
        died = self.status == "running" and self.seconds_old > ALIVE_SECONDS
        return "interrupted" if died else self.status

    def has_content(self, name: str, content: FileDigest) -> bool:
        """Whether a file is right with this content."""
        return content in (self.files.get(name), self.replacing.get(name))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MirrorManifest:
        """From the JSON's values.

        Raises:
            KeyError, TypeError, ValueError: they are none of a manifest, or name what cannot be in a run.
        """
        if misfit := find_type_error(MANIFEST, values):
            raise ValueError(misfit)
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']}; this version reads format {FORMAT}")
        told = {key: {n: FileDigest(**c) for n, c in values[key].items()} for key in ("files", "replacing")}
        manifest = cls(**{**values, **told})
        check_run_id(manifest.run_id)
        check_experiment(manifest.experiment)
        for name, content in (*manifest.files.items(), *manifest.replacing.items()):
            if fault := find_name_fault(name):
                raise ValueError(f"it names the file {name!r}, which is outside the run: {fault}")
            content.check_values()
        if manifest.status not in STATUSES:
            raise ValueError(f"its status is {manifest.status!r}, expected {', '.join(STATUSES)}")
        if datetime.fromisoformat(manifest.updated).tzinfo is None:
            raise ValueError(f"updated is {manifest.updated}, without a time zone")
        return manifest


@dataclass(frozen=True)
class RemoteRun:
    """A run in a mirror; `path` is its place there: experiments/NAME/runs/ID."""

    storage: StorageBackend
    path: str

    @property
    def place(self) -> str:
        """For messages, and for commands."""
        return f"{self.storage.place.rstrip('/')}/{self.path}"

    @property
    def run_id(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def experiment(self) -> str:
        return PurePosixPath(self.path).parts[-3]

    def storage_name(self, file: str) -> str:
        """A file of the run, as the storage names it."""
        return f"{self.path}/{file}"

    def list_files(self) -> dict[str, int]:
        """The sizes of all files that are there, by their names in the run; mirror.json is none of them."""
        start = len(self.path) + 1
        there = {name[start:]: size for name, size in self.storage.list(self.path).items()}
        return {name: size for name, size in there.items() if name != MANIFEST}

    def read_manifest(self) -> MirrorManifest:
        """What it holds.

        Raises:
            CheckpointError: there is no such run, or its mirror.json is damaged.
            IntegrationError: no answer.
        """
        if not self.storage.exists(self.storage_name(MANIFEST)):
            raise CheckpointError(
                f"{self.place} is no mirrored run: there is no {MANIFEST}. See what is there: "
                f"training-lens experiment list --mirror {self.storage.place}"
            )
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / MANIFEST
            self.storage.get_file(self.storage_name(MANIFEST), local)
            try:
                manifest = MirrorManifest.from_json(read_json(local))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{self.place}/{MANIFEST} is damaged ({error}). training-lens sync, where the run is, mends it."
                ) from error
        if (manifest.experiment, manifest.run_id) != (self.experiment, self.run_id):
            raise CheckpointError(
                f"{self.place}/{MANIFEST} says that it is the run {manifest.run_id} of experiment "
                f"{manifest.experiment}, and stands elsewhere. Nothing of it is fetched: put the folder back under the "
                "names that it had, or send the run again with training-lens sync, where it is."
            )
        return manifest

    def write_manifest(self, manifest: MirrorManifest) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / MANIFEST
            write_json(local, asdict(manifest), verbatim=True)
            self.storage.put_file(local, self.storage_name(MANIFEST))
