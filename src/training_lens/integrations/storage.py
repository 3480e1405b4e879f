"""Storage of files by name, in a folder or at a URL, through fsspec. Your own backend is one subclass.

Example:
    storage = open_storage("s3://bucket/path")
    storage.put_file(Path("notes.txt"), "notes.txt")
    assert storage.verify("notes.txt", Path("notes.txt"))
"""

from __future__ import annotations

import base64
import builtins
import errno
import hashlib
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from training_lens.errors import IntegrationError
from training_lens.utils.files import TEMPORARY, atomic_file, hash_file
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home, find_name_fault
from training_lens.utils.secrets import redact_text

logger = get_logger(__name__)
SHOWN_CHARACTERS = 100  # of a skipped name in a warning
PART_BYTES = 50 * 2**20  # of a large upload to S3, which its ETag depends on
ETAG = re.compile(r'"?([0-9a-f]{32})(-\d+)?"?')
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
S3_OPTIONS: dict[str, Any] = {  # the sender tries again by itself, so the client fails soon
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1}},
    "use_listings_cache": False,
    "skip_instance_cache": True,
}


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


class FsspecStorage(StorageBackend):
    """A URL of S3, Google, Azure, SSH, the Hugging Face hub, or another service that fsspec has a driver for.

    Credentials come from the environment, as with each service's own tools; AWS_ENDPOINT_URL selects another server
    with the S3 protocol.

    Raises:
        IntegrationError: the URL names no place, holds a password, or has an unknown protocol; its package is missing;
            or the driver refuses credentials or options.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._protocol = url_protocol(url)
        self._service = EXTRAS.get(self._protocol, self._protocol)
        self._fs, root = self._open_filesystem(url)
        self._root = root.rstrip("/")

    def _open_filesystem(self, url: str) -> tuple[Any, str]:
        """fsspec's file system, and the path of this storage in it."""
        import fsspec

        protocol = self._protocol
        if not url.partition("://")[2].strip("/"):
            raise IntegrationError(f"{url} names no place; give one, such as {protocol}://bucket/path.", lasting=True)
        if urlsplit(url).password is not None:
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
                f"{url}: the protocol {protocol}:// is unknown. Give a folder, or a URL with s3, gs, az, ssh or hf.",
                lasting=True,
            ) from error
        with self._explain_errors():
            filesystem, root = fsspec.core.url_to_fs(url, **(S3_OPTIONS if self._service == "s3" else {}))
        return filesystem, str(root)

    def put_file(self, local: Path | str, name: str) -> None:
        path = self._full_path(name)
        with self._explain_errors():
            self._fs.put_file(str(local), path, **({"chunksize": PART_BYTES} if self._service == "s3" else {}))

    def get_file(self, name: str, local: Path | str) -> None:
        path = self._full_path(name)
        with atomic_file(Path(local)) as temporary, self._explain_errors(name):
            self._fs.get_file(path, str(temporary))

    def list(self, folder: str = "") -> dict[str, int]:
        found = self._list_folder(folder, self._fs.find)
        files = {path[len(self._root) + 1 :]: info for path, info in dict(found).items() if info["type"] == "file"}
        whole = [name for name in files if not name.rpartition("/")[2].startswith(TEMPORARY)]
        return {name: files[name]["size"] for name in keep_valid_names(whole, self.place)}

    def delete(self, name: str) -> None:
        path = self._full_path(name)
        with self._explain_errors(), suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def list_folders(self, folder: str = "") -> builtins.list[str]:
        found = self._list_folder(folder, self._fs.ls)
        names = [info["name"].rstrip("/").split("/")[-1] for info in found if info["type"] == "directory"]
        return sorted(keep_valid_names(names, self.place))

    def _list_folder(self, folder: str, list_entries: Callable[..., Any]) -> Any:
        """The entries that the driver's `find` or `ls` gives of a folder; none if it does not exist."""
        path = self._full_path(folder) if folder else self._root or "/"
        self._fs.invalidate_cache()  # drivers cache listings, and others write meanwhile
        with self._explain_errors():
            try:
                return list_entries(path, detail=True)
            except FileNotFoundError as error:
                response = getattr(error.__cause__, "response", None) or {}
                if response.get("Error", {}).get("Code") == "NoSuchBucket":  # of S3; a missing folder is just empty
                    raise
                return {}

    def exists(self, name: str) -> bool:
        return self._read_info(name) is not None

    def verify(self, name: str, local: Path | str) -> bool:
        """Whether the file has the content of `local`: by the server's checksum if it gives one, else read back."""
        info = self._read_info(name)
        local = Path(local)
        if info is None or info["size"] != local.stat().st_size:
            return False
        return is_checksum_of(info, local) or super().verify(name, local)

    def _read_info(self, name: str) -> dict[str, Any] | None:
        """What the driver says of a file; None if there is none of that name."""
        path = self._full_path(name)
        self._fs.invalidate_cache()
        with self._explain_errors(), suppress(FileNotFoundError, NotADirectoryError):
            info = dict(self._fs.info(path))
            return info if info["type"] == "file" else None
        return None

    def _full_path(self, name: str) -> str:
        return f"{self._root}/{check_name(name, self.place)}"

    @contextmanager
    def _explain_errors(self, name: str = "") -> Iterator[None]:
        """Turns a driver's exceptions into one clear line; a full local disk stays an OSError."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            why = describe_error(error)
            if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                why = f"no access: {why}"
                if self._protocol:
                    source = CREDENTIALS.get(self._service, "the driver's own settings")
                    why = f"{why} Credentials are taken from {source}."
            else:
                why = f"not there: {why}" if isinstance(error, FileNotFoundError) else f"no answer: {why}"
            where = f"{self.place.rstrip('/')}/{name}".rstrip("/")
            raise IntegrationError(redact_text(f"{where}: {why}")) from error


class LocalStorage(FsspecStorage):
    """A folder on a local or mounted disk, created with the first file. Files are written atomically."""

    def __init__(self, folder: Path | str) -> None:
        if not str(folder).strip():
            raise IntegrationError("the name of the storage is empty; give a folder.", lasting=True)
        self.folder = expand_home(folder).absolute()
        super().__init__(str(folder))

    def _open_filesystem(self, url: str) -> tuple[Any, str]:
        import fsspec

        return fsspec.filesystem("file"), self.folder.as_posix()

    def put_file(self, local: Path | str, name: str) -> None:
        path = Path(self._full_path(name))
        with self._explain_errors(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                self._fs.put_file(str(local), str(temporary))

    def get_file(self, name: str, local: Path | str) -> None:
        if not self.exists(name):
            raise IntegrationError(f"{self.folder / name}: there is no such file.")
        super().get_file(name, local)

    def verify(self, name: str, local: Path | str) -> bool:
        return self.exists(name) and hash_file(Path(self._full_path(name))) == hash_file(Path(local))

    def _full_path(self, name: str) -> str:
        path = super()._full_path(name)
        if not Path(path).resolve().is_relative_to(self.folder.resolve()):
            raise build_name_error(name, self.place, "a symbolic link leads out of the folder")
        return path


def check_name(name: str, place: str) -> str:
    """`name`, if it is valid within the storage at `place` on all systems that may read it; see `find_name_fault`."""
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


def is_checksum_of(info: Mapping[str, Any], local: Path) -> bool:
    """Whether the server's checksum of a file is that of `local`.

    S3 gives an ETag: the MD5 of the content, or for a multipart upload the MD5 of the parts' MD5s, `-`, and their
    number (docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html). Google gives
    `md5Hash`, the MD5 in base64. False also where there is no comparable checksum: the ETag of content encrypted with a
    KMS key is no MD5. Reads `local` once; `info` is what fsspec gives of the file.
    """
    if isinstance(md5 := info.get("md5Hash"), str):
        return md5 == base64.b64encode(_hash_md5(local).digest()).decode()
    match = ETAG.fullmatch(str(info.get("ETag", "")))
    if match is None:
        return False
    if match[2] is None:
        return match[1] == _hash_md5(local).hexdigest()
    digests = b""
    with local.open("rb") as file:
        while part := file.read(PART_BYTES):
            digests += hashlib.md5(part, usedforsecurity=False).digest()
    return match[1] == hashlib.md5(digests, usedforsecurity=False).hexdigest()


def _hash_md5(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))


def url_protocol(place: str) -> str:
    """The protocol of a URL, such as s3; empty for the path of a folder."""
    protocol, separator, _ = place.partition("://")
    return protocol.lower() if separator else ""


def open_storage(place: str | Path) -> StorageBackend:
    """The storage at a folder's path or a URL, see `FsspecStorage`. Makes no request yet."""
    protocol = url_protocol(str(place))
    if protocol in ("", "file", "local"):
        return LocalStorage(str(place).partition("://")[2] if protocol else place)
    return FsspecStorage(str(place))
