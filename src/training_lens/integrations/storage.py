"""Places for files besides this machine's disk: a folder, or a URL that fsspec takes. Your own is one subclass.

Example:
    storage = open_storage("s3://bucket/path")
    storage.put_file(Path("notes.txt"), "notes.txt")
    assert storage.verify("notes.txt", Path("notes.txt"))
"""

from __future__ import annotations

import builtins
import errno
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from training_lens.errors import IntegrationError
from training_lens.integrations.checksums import PART_BYTES, vouched
from training_lens.utils.files import TEMPORARY, atomic_file, hash_file, list_files
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home, find_name_fault
from training_lens.utils.secrets import has_password, redact_text

logger = get_logger(__name__)
SHOWN_CHARACTERS = 100  # of a name that is left out
EXTRAS = {  # protocol -> our extra with its driver
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "azure"),
    **dict.fromkeys(("ssh", "sftp"), "ssh"),
}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "azure": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
    "ssh": "the SSH agent and ~/.ssh/config",
    "hf": "HF_TOKEN, or hf auth login",
}
S3_OPTIONS: dict[str, Any] = {  # who sends tries again itself, so the client fails soon
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1}},
    "use_listings_cache": False,
    "skip_instance_cache": True,
}


class StorageBackend(ABC):
    """Files by name at one place. Names are relative, with `/` between folders: "lens/loss/00000001-00000006.parquet".

    A name that would lead elsewhere is refused, see `check_name`, which your own backend calls, too. What goes wrong
    there is an `IntegrationError`, or an `OSError` of the disk here. Override the four abstract methods; the others
    follow from them, and may be overridden where a service has a shorter way.

    Args:
        place: what the user gave, for messages.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    @abstractmethod
    def put_file(self, local: Path | str, name: str) -> None:
        """Store the file at `local` under `name`, in place of what is there. Readers should never see half of it."""

    @abstractmethod
    def get_file(self, name: str, local: Path | str) -> None:
        """Write the file of that name to `local`, whole or not at all; the folder of `local` is there.

        Raises:
            IntegrationError: there is no such file, or no answer.
        """

    @abstractmethod
    def list(self, folder: str = "") -> dict[str, int]:
        """The sizes in bytes of all files in a folder and those below it, by name; none where it is not there."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""

    def folders(self, folder: str = "") -> builtins.list[str]:
        """The names of the folders directly in a folder, sorted, without what is above them."""
        above = f"{folder}/" if folder else ""
        below = [name.removeprefix(above) for name in self.list(folder)]
        return sorted({name.split("/")[0] for name in below if "/" in name})

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return name in self.list(str(PurePosixPath(name).parent).removeprefix("."))

    def verify(self, name: str, local: Path | str) -> bool:
        """Whether the file of that name has the content of `local`, by its hash. Here: read back, and compared."""
        with tempfile.TemporaryDirectory() as folder:
            back = Path(folder) / "back"
            self.get_file(name, back)
            return hash_file(back) == hash_file(Path(local))


class LocalStorage(StorageBackend):
    """A folder, on this machine's disk or one that is mounted; made when the first file comes."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(str(folder))
        if not str(folder).strip():
            raise IntegrationError("an empty name is given, which means no storage; give a folder.", lasting=True)
        self.folder = expand_home(folder)

    def put_file(self, local: Path | str, name: str) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            shutil.copyfile(local, temporary)

    def get_file(self, name: str, local: Path | str) -> None:
        path = self._path(name)
        with atomic_file(Path(local)) as temporary:
            try:
                shutil.copyfile(path, temporary)
            except FileNotFoundError as error:
                raise IntegrationError(f"{path}: there is no such file.") from error

    def list(self, folder: str = "") -> dict[str, int]:
        place = self._path(folder) if folder else self.folder
        files = [path for path in list_files(place) if not path.name.startswith(TEMPORARY) and self._holds(path)]
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}
        return {name: sizes[name] for name in _known(sizes, self.place)}

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def verify(self, name: str, local: Path | str) -> bool:
        return self.exists(name) and hash_file(self._path(name)) == hash_file(Path(local))

    def _path(self, name: str) -> Path:
        """The file or folder of that name.

        Raises:
            IntegrationError: see `check_name`; or a symbolic link on the way leads out of the folder.
        """
        path = self.folder / check_name(name, self.place)
        if not self._holds(path):
            raise _misplaced(name, self.place, "a symbolic link leads out of the folder")
        return path

    def _holds(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.folder.resolve())


class FsspecStorage(StorageBackend):
    """A URL of S3, Google, Azure, SSH, the Hugging Face hub, or another place that fsspec has a driver for.

    Credentials come from the environment, as each service's own tools take them; AWS_ENDPOINT_URL leads to other
    servers that speak S3.

    Raises:
        IntegrationError: see `require_driver`; or credentials or options that the driver refuses.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        require_driver(url)
        import fsspec

        self._protocol = protocol_of(url)
        with self._asking():
            options = S3_OPTIONS if EXTRAS.get(self._protocol) == "s3" else {}
            self._fs, root = fsspec.core.url_to_fs(url, **options)
            self._root = str(root).rstrip("/")

    def put_file(self, local: Path | str, name: str) -> None:
        options, path = {"chunksize": PART_BYTES} if EXTRAS.get(self._protocol) == "s3" else {}, self._path(name)
        with self._asking():
            self._fs.put_file(str(local), path, **options)

    def get_file(self, name: str, local: Path | str) -> None:
        path = self._path(name)
        with atomic_file(Path(local)) as temporary, self._asking(name):
            self._fs.get_file(path, str(temporary))

    def list(self, folder: str = "") -> dict[str, int]:
        path = self._folder(folder)
        self._fs.invalidate_cache()  # drivers keep listings, and others write meanwhile
        with self._asking():
            try:
                found = self._fs.find(path, detail=True)
            except FileNotFoundError as error:
                if _lacks_bucket(error):
                    raise
                return {}
        start = len(self._root) + 1
        sizes = {name[start:]: info["size"] for name, info in dict(found).items() if info["type"] == "file"}
        return {name: sizes[name] for name in _known(sizes, self.place)}

    def delete(self, name: str) -> None:
        path = self._path(name)
        with self._asking():
            try:
                self._fs.rm_file(path)
            except FileNotFoundError:
                return

    def folders(self, folder: str = "") -> builtins.list[str]:
        path = self._folder(folder)
        self._fs.invalidate_cache()
        with self._asking():
            try:
                found = self._fs.ls(path, detail=True)
            except FileNotFoundError as error:
                if _lacks_bucket(error):
                    raise
                return []
        names = [info["name"].rstrip("/").split("/")[-1] for info in found if info["type"] == "directory"]
        return sorted(_known(names, self.place))

    def exists(self, name: str) -> bool:
        return self._info(name) is not None

    def verify(self, name: str, local: Path | str) -> bool:
        """Whether it has the content of `local`: by the server's checksum where it gives one, else read back."""
        info = self._info(name)
        local = Path(local)
        if info is None or info["size"] != local.stat().st_size:
            return False
        return vouched(info, local) or super().verify(name, local)

    def _info(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        self._fs.invalidate_cache()
        with self._asking():
            try:
                return dict(self._fs.info(path))
            except FileNotFoundError:
                return None

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name, self.place)}"

    def _folder(self, name: str) -> str:
        return self._path(name) if name else self._root

    @contextmanager
    def _asking(self, name: str = "") -> Iterator[None]:
        """Turns what a driver raises into one clear line; a full disk here stays what it is."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f"{self.place.rstrip('/')}/{name}".rstrip("/")
            raise IntegrationError(redact_text(f"{where}: {self._explained(error)}")) from error

    def _explained(self, error: Exception) -> str:
        service = EXTRAS.get(self._protocol, self._protocol)
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            source = CREDENTIALS.get(service, "the driver's own settings")
            return f"no access: {describe_error(error)} Credentials are taken from {source}."
        if isinstance(error, FileNotFoundError):
            return f"not there: {describe_error(error)}"
        return f"no answer: {describe_error(error)}"


def check_name(name: str, place: str) -> str:
    """`name`, where it means a file or folder within a storage, by the rules of every system that may read it.

    Args:
        place: the storage, for the message.

    Raises:
        IntegrationError: see `find_name_fault`.
    """
    if fault := find_name_fault(name):
        raise _misplaced(name, place, fault)
    return name


def _known(names: Iterable[str], place: str) -> set[str]:
    """The names of a listing that can be asked for; it comes from outside, and others are left out with a warning."""
    faults = {name: fault for name in names if (fault := find_name_fault(name))}
    if faults:
        first, why = next(iter(faults.items()))
        logger.warning(
            "%s: %d names there are left out; %r: %s", redact_text(place), len(faults), first[:SHOWN_CHARACTERS], why
        )
    return set(names) - faults.keys()


def _misplaced(name: str, place: str, why: str) -> IntegrationError:
    return IntegrationError(
        f"{redact_text(place)}: {name!r} names nothing in this storage: {why}. Give a relative name with '/' between "
        "folders, such as lens/loss.parquet.",
        lasting=True,
    )


def _lacks_bucket(error: FileNotFoundError) -> bool:
    """Whether S3 says that there is no such bucket; a folder that is not there holds nothing, which is no error."""
    response = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "NoSuchBucket")


def protocol_of(place: str) -> str:
    """What a URL begins with, such as s3; empty of a folder's path."""
    protocol, separator, _ = place.partition("://")
    return protocol.lower() if separator else ""


def require_driver(url: str) -> None:
    """Make sure, without network, that a URL can be opened here.

    Raises:
        IntegrationError: it names no place or holds a password, nothing knows its protocol, or the package for that
            is missing.
    """
    import fsspec

    protocol = protocol_of(url)
    if not url.partition("://")[2].strip("/"):
        raise IntegrationError(f"{url} names no place; give one, such as {protocol}://bucket/path.", lasting=True)
    if has_password(url):
        raise IntegrationError(
            f"{redact_text(url)}: a password in a URL ends up in files. Leave it out, and set the environment "
            "variables that the service reads.",
            lasting=True,
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        install = f"training-lens[{EXTRAS[protocol]}]" if protocol in EXTRAS else str(error.name or error)
        raise IntegrationError(
            f"{url}: {protocol}:// needs a package that is not installed: pip install '{install}'.", lasting=True
        ) from error
    except ValueError as error:
        raise IntegrationError(
            f"{url}: nothing knows {protocol}://. Give a folder, or a URL with s3, gs, az, ssh or hf.", lasting=True
        ) from error


def open_storage(place: str | Path) -> StorageBackend:
    """The storage at a folder's path or a URL. Asks nobody yet.

    Raises:
        IntegrationError: see `require_driver`.
    """
    protocol = protocol_of(str(place))
    if protocol in ("", "file", "local"):
        return LocalStorage(str(place).partition("://")[2] if protocol else place)
    return FsspecStorage(str(place))
