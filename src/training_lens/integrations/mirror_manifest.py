"""A mirrored run, and mirror.json, which lists its files."""

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
from training_lens.runs.run_folder import parse_start_time
from training_lens.utils.file_schemas import find_type_error
from training_lens.utils.files import read_json, write_json
from training_lens.utils.names import check_experiment, check_run_id, find_name_fault

MANIFEST = "mirror.json"
FORMAT = 1
STATUSES = ("running", "finished", "failed", "pruned", "interrupted", "unknown")
SHA256 = re.compile(r"[0-9a-f]{64}")
ALIVE_SECONDS = 120.0  # a run that is `running`, but whose mirror.json is older than this, counts as dead


@dataclass(frozen=True)
class FileDigest:
    """The sha256 and size in bytes of a file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class MirrorManifest:
    """mirror.json: the files of a mirrored run. It is written after them.

    Args:
        status: of the run: running, finished, failed, pruned or interrupted.
        host: that wrote it, from the run's `folder`; `updated`: when (UTC).
        version: random, and new at each writing.
        replacing: files that are being overwritten: until the next manifest they have this digest or that of `files`.
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
    def start_time(self) -> datetime:
        """When the run started, in UTC: from its id if that is a timestamp, else when it was last heard of."""
        return parse_start_time(self.run_id) or datetime.fromisoformat(self.updated)

    @property
    def seconds_old(self) -> float:
        return (datetime.now(UTC) - datetime.fromisoformat(self.updated)).total_seconds()

    @property
    def status_now(self) -> str:
        """`status`, or interrupted if it is `running` and was not updated for `ALIVE_SECONDS`."""
        died = self.status == "running" and self.seconds_old > ALIVE_SECONDS
        return "interrupted" if died else self.status

    def has_content(self, name: str, content: FileDigest) -> bool:
        """Whether a file may have this content."""
        return content in (self.files.get(name), self.replacing.get(name))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MirrorManifest:
        """A manifest from the values of its JSON; an error if they are of none, or name files outside the run."""
        if misfit := find_type_error(MANIFEST, values):
            raise ValueError(misfit)
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']}; this version reads format {FORMAT}")
        digests = {key: {n: FileDigest(**c) for n, c in values[key].items()} for key in ("files", "replacing")}
        manifest = cls(**{**values, **digests})
        check_run_id(manifest.run_id)
        check_experiment(manifest.experiment)
        for name, content in (*manifest.files.items(), *manifest.replacing.items()):
            if fault := find_name_fault(name):
                raise ValueError(f"it names the file {name!r}, which is outside the run: {fault}")
            if not isinstance(content.sha256, str) or not SHA256.fullmatch(content.sha256):
                raise ValueError(f"{content.sha256!r} is no sha256")
            if type(content.size) is not int or not 0 <= content.size < 2**63:
                raise ValueError(f"{content.size!r} is no size in bytes")
        if manifest.status not in STATUSES:
            raise ValueError(f"its status is {manifest.status!r}, expected {', '.join(STATUSES)}")
        if datetime.fromisoformat(manifest.updated).tzinfo is None:
            raise ValueError(f"updated is {manifest.updated}, without a time zone")
        return manifest


@dataclass(frozen=True)
class RemoteRun:
    """A run in a mirror; `path` is its folder there: experiments/NAME/runs/ID."""

    storage: StorageBackend
    path: str

    @property
    def place(self) -> str:
        """The run's folder or URL, for messages and commands."""
        return f"{self.storage.place.rstrip('/')}/{self.path}"

    @property
    def run_id(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def experiment(self) -> str:
        return PurePosixPath(self.path).parts[-3]

    def storage_name(self, file: str) -> str:
        """The name of a run's file in the storage."""
        return f"{self.path}/{file}"

    def list_files(self) -> dict[str, int]:
        """The sizes of the run's files in the storage, by their names in the run, without mirror.json."""
        start = len(self.path) + 1
        there = {name[start:]: size for name, size in self.storage.list(self.path).items()}
        return {name: size for name, size in there.items() if name != MANIFEST}

    def read_manifest(self) -> MirrorManifest:
        """Read and check mirror.json; a `CheckpointError` if it is missing or damaged."""
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
                    f"{self.place}/{MANIFEST} is damaged ({error}). training-lens sync, where the run is, repairs it."
                ) from error
        if (manifest.experiment, manifest.run_id) != (self.experiment, self.run_id):
            raise CheckpointError(
                f"{self.place}/{MANIFEST} says that it is the run {manifest.run_id} of experiment "
                f"{manifest.experiment}, but it is elsewhere. Nothing is fetched: rename the folder back, "
                "or send the run again with training-lens sync, where it is."
            )
        return manifest

    def write_manifest(self, manifest: MirrorManifest) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / MANIFEST
            write_json(local, asdict(manifest), verbatim=True)
            self.storage.put_file(local, self.storage_name(MANIFEST))
