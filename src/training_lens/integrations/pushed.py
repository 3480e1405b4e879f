"""What a push sends, and what of it a repository lacks: values, without any network."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from training_lens.utils.files import hash_file

CHECKPOINTS = "training_lens_checkpoints"


@dataclass(frozen=True)
class PushedFile:
    """A file as it will be in the repository: `source` is a local file, or the content itself."""

    path: str
    source: Path | bytes

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """In hexadecimal; reads a local file once."""
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else hash_file(self.source)

    @cached_property
    def blob_id(self) -> str:
        """What git calls this content: the sha1 of a header and it."""
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

    @property
    def is_there(self) -> bool:
        """Whether it can still be read: the run deletes checkpoints while it trains."""
        return isinstance(self.source, bytes) or self.source.is_file()


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository. `sha256` of those in large-file storage; of others, None: git knows their blob id."""

    size: int
    blob_id: str
    sha256: str | None = None

    def equals(self, file: PushedFile) -> bool:
        """Whether both have the same content."""
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 is not None else self.blob_id == file.blob_id


@dataclass(frozen=True)
class PushPlan:
    """What one push does: `send` is new or other there, `there` is there already, `delete` are folders to go.

    `unknown` says why the repository could not be looked at; then everything is in `send`.
    """

    send: tuple[PushedFile, ...]
    there: tuple[PushedFile, ...] = ()
    delete: tuple[str, ...] = ()
    unknown: str = ""

    @property
    def is_done(self) -> bool:
        """Whether the repository has it all."""
        return not self.send and not self.delete

    @property
    def size(self) -> int:
        """Bytes to send."""
        return sum(file.size for file in self.send)


def plan_push(wanted: Sequence[PushedFile], remote: Mapping[str, RemoteFile]) -> PushPlan:
    """What makes a repository have `wanted`.

    Of what else is there, nothing is touched but checkpoints that the run has thinned out: where it has any, the
    repository keeps the same ones.
    """
    there = tuple(file for file in wanted if (found := remote.get(file.path)) is not None and found.equals(file))
    same = {file.path for file in there}
    send = tuple(file for file in wanted if file.path not in same)
    return PushPlan(send, there, _thinned([file.path for file in wanted], remote))


def _thinned(wanted: Collection[str], remote: Collection[str]) -> tuple[str, ...]:
    """Folders of checkpoints that are in the repository alone; none where nothing says which are wanted."""
    ours, theirs = _checkpoints(wanted), _checkpoints(remote)
    return tuple(sorted(theirs - ours)) if ours else ()


def _checkpoints(paths: Collection[str]) -> set[str]:
    return {"/".join(parts[:2]) + "/" for path in paths if (parts := path.split("/"))[0] == CHECKPOINTS and parts[2:]}
