"""Storage of files by name, in a folder; at a URL, see `fsspec_storage`. Your own backend is one subclass.

Example:
    storage = open_storage("s3://bucket/path")
    storage.put_file(Path("notes.txt"), "notes.txt")
    assert storage.verify("notes.txt", Path("notes.txt"))
"""

from __future__ import annotations

import builtins
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from training_lens.errors import IntegrationError
from training_lens.utils.files import TEMPORARY, atomic_file, hash_file, list_files
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home, find_name_fault
from training_lens.utils.secrets import redact_text

logger = get_logger(__name__)
SHOWN_CHARACTERS = 100  # of a skipped name in a warning


class StorageBackend(ABC):
    """Files by name at one place. Names are relative, with `/` between folders: "lens/loss/00000001-00000006.parquet".

    Names that lead outside are refused by `check_name`; call it in your own backend, too. A failure of the storage is
    an `IntegrationError`, one of the local disk an `OSError`. Override the four abstract methods; override the others
    where a service has a faster way.

    Args:
        place: as the user gave it, for messages.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    @abstractmethod
    def put_file(self, local: Path | str, name: str) -> None:
        """Store the file at `local` under `name`, replacing it. Readers should never see half of a file."""

    @abstractmethod
    def get_file(self, name: str, local: Path | str) -> None:
        """Write the file to `local`, atomically; the folder of `local` exists.

        Raises:
            IntegrationError: there is no such file, or no answer.
        """

    @abstractmethod
    def list(self, folder: str = "") -> dict[str, int]:
        """The sizes in bytes of all files below a folder, by name; empty if the folder does not exist."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file; a missing one is no error."""

    def list_folders(self, folder: str = "") -> builtins.list[str]:
        """The names of the folders directly in a folder, sorted."""
        above = f"{folder}/" if folder else ""
        below = [name.removeprefix(above) for name in self.list(folder)]
        return sorted({name.split("/")[0] for name in below if "/" in name})

    def exists(self, name: str) -> bool:
        """Whether a file of that name exists."""
        return name in self.list(str(PurePosixPath(name).parent).removeprefix("."))

    def verify(self, name: str, local: Path | str) -> bool:
        """Whether the file has the content of `local`, by its hash. By default it is read back and compared."""
        with tempfile.TemporaryDirectory() as folder:
            back = Path(folder) / "back"
            self.get_file(name, back)
            return hash_file(back) == hash_file(Path(local))


class LocalStorage(StorageBackend):
    """A folder on a local or mounted disk, created with the first file."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(str(folder))
        if not str(folder).strip():
            raise IntegrationError("the name of the storage is empty; give a folder.", lasting=True)
        self.folder = expand_home(folder)

    def put_file(self, local: Path | str, name: str) -> None:
        path = self._full_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            shutil.copyfile(local, temporary)

    def get_file(self, name: str, local: Path | str) -> None:
        path = self._full_path(name)
        with atomic_file(Path(local)) as temporary:
            try:
                shutil.copyfile(path, temporary)
            except FileNotFoundError as error:
                raise IntegrationError(f"{path}: there is no such file.") from error

    def list(self, folder: str = "") -> dict[str, int]:
        place = self._full_path(folder) if folder else self.folder
        files = [path for path in list_files(place) if not path.name.startswith(TEMPORARY) and self._is_inside(path)]
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}
        return {name: sizes[name] for name in keep_valid_names(sizes, self.place)}

    def delete(self, name: str) -> None:
        self._full_path(name).unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        return self._full_path(name).is_file()

    def verify(self, name: str, local: Path | str) -> bool:
        return self.exists(name) and hash_file(self._full_path(name)) == hash_file(Path(local))

    def _full_path(self, name: str) -> Path:
        """The path of a file or folder.

        Raises:
            IntegrationError: see `check_name`; or a symbolic link leads out of the folder.
        """
        path = self.folder / check_name(name, self.place)
        if not self._is_inside(path):
            raise build_name_error(name, self.place, "a symbolic link leads out of the folder")
        return path

    def _is_inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.folder.resolve())


def check_name(name: str, place: str) -> str:
    """`name`, if it is a valid name within a storage on all systems that may read it.

    Args:
        place: the storage, for the message.

    Raises:
        IntegrationError: see `find_name_fault`.
    """
    if fault := find_name_fault(name):
        raise build_name_error(name, place, fault)
    return name


def keep_valid_names(names: Iterable[str], place: str) -> set[str]:
    """The valid names of a listing, which comes from outside; others are skipped with a warning."""
    faults = {name: fault for name in names if (fault := find_name_fault(name))}
    if faults:
        first, why = next(iter(faults.items()))
        logger.warning(
            "%s: %d names are skipped; %r: %s", redact_text(place), len(faults), first[:SHOWN_CHARACTERS], why
        )
    return set(names) - faults.keys()


def build_name_error(name: str, place: str, why: str) -> IntegrationError:
    return IntegrationError(
        f"{redact_text(place)}: {name!r} names nothing in this storage: {why}. Give a relative name with '/' between "
        "folders, such as lens/loss.parquet.",
        lasting=True,
    )
