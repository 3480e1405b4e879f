"""Storage at a URL: S3, Google, Azure, SSH, the Hugging Face hub, or whatever else fsspec has a driver for."""

from __future__ import annotations

import base64
import builtins
import errno
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training_lens.errors import IntegrationError
from training_lens.integrations.storage import LocalStorage, StorageBackend, check_name, keep_valid_names
from training_lens.utils.files import atomic_file
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.secrets import has_password, redact_text

logger = get_logger(__name__)
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


class FsspecStorage(StorageBackend):
    """A URL of S3, Google, Azure, SSH, the Hugging Face hub, or another service that fsspec has a driver for.

    Credentials come from the environment, as with each service's own tools; AWS_ENDPOINT_URL selects another server
    with the S3 protocol.

    Raises:
        IntegrationError: see `require_driver`; or credentials or options that the driver refuses.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        require_driver(url)
        import fsspec

        self._protocol = url_protocol(url)
        with self._explain_errors():
            options = S3_OPTIONS if EXTRAS.get(self._protocol) == "s3" else {}
            self._fs, root = fsspec.core.url_to_fs(url, **options)
            self._root = str(root).rstrip("/")

    def put_file(self, local: Path | str, name: str) -> None:
        options, path = {"chunksize": PART_BYTES} if EXTRAS.get(self._protocol) == "s3" else {}, self._full_path(name)
        with self._explain_errors():
            self._fs.put_file(str(local), path, **options)

    def get_file(self, name: str, local: Path | str) -> None:
        path = self._full_path(name)
        with atomic_file(Path(local)) as temporary, self._explain_errors(name):
            self._fs.get_file(path, str(temporary))

    def list(self, folder: str = "") -> dict[str, int]:
        path = self._full_folder(folder)
        self._fs.invalidate_cache()  # drivers cache listings, and others write meanwhile
        with self._explain_errors():
            try:
                found = self._fs.find(path, detail=True)
            except FileNotFoundError as error:
                if _lacks_bucket(error):
                    raise
                return {}
        start = len(self._root) + 1
        sizes = {name[start:]: info["size"] for name, info in dict(found).items() if info["type"] == "file"}
        return {name: sizes[name] for name in keep_valid_names(sizes, self.place)}

    def delete(self, name: str) -> None:
        path = self._full_path(name)
        with self._explain_errors():
            try:
                self._fs.rm_file(path)
            except FileNotFoundError:
                return

    def list_folders(self, folder: str = "") -> builtins.list[str]:
        path = self._full_folder(folder)
        self._fs.invalidate_cache()
        with self._explain_errors():
            try:
                found = self._fs.ls(path, detail=True)
            except FileNotFoundError as error:
                if _lacks_bucket(error):
                    raise
                return []
        names = [info["name"].rstrip("/").split("/")[-1] for info in found if info["type"] == "directory"]
        return sorted(keep_valid_names(names, self.place))

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
        path = self._full_path(name)
        self._fs.invalidate_cache()
        with self._explain_errors():
            try:
                return dict(self._fs.info(path))
            except FileNotFoundError:
                return None

    def _full_path(self, name: str) -> str:
        return f"{self._root}/{check_name(name, self.place)}"

    def _full_folder(self, name: str) -> str:
        return self._full_path(name) if name else self._root

    @contextmanager
    def _explain_errors(self, name: str = "") -> Iterator[None]:
        """Turns a driver's exceptions into one clear line; a full local disk stays an OSError."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f"{self.place.rstrip('/')}/{name}".rstrip("/")
            raise IntegrationError(redact_text(f"{where}: {self._describe_failure(error)}")) from error

    def _describe_failure(self, error: Exception) -> str:
        service = EXTRAS.get(self._protocol, self._protocol)
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            source = CREDENTIALS.get(service, "the driver's own settings")
            return f"no access: {describe_error(error)} Credentials are taken from {source}."
        if isinstance(error, FileNotFoundError):
            return f"not there: {describe_error(error)}"
        return f"no answer: {describe_error(error)}"


def _lacks_bucket(error: FileNotFoundError) -> bool:
    """Whether S3 says that there is no such bucket. A missing folder, in contrast, is just empty."""
    response = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "NoSuchBucket")


def is_checksum_of(info: Mapping[str, Any], local: Path) -> bool:
    """Whether the server's checksum of a file is that of `local`.

    S3 gives an ETag: the MD5 of the content, or for a multipart upload the MD5 of the parts' MD5s, `-`, and their
    number (docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html). Google gives
    `md5Hash`, the MD5 in base64. Reads `local` once.

    Args:
        info: of the file, as fsspec gives it.

    Returns:
        False if the contents differ, or there is no comparable checksum: the ETag of content encrypted with a KMS key
        is no MD5.
    """
    if isinstance(md5 := info.get("md5Hash"), str):
        return md5 == base64.b64encode(_hash_md5(local).digest()).decode()
    match = ETAG.fullmatch(str(info.get("ETag", "")))
    if match is None:
        return False
    return match[1] == (_md5_of_parts(local) if match[2] else _hash_md5(local).hexdigest())


def _hash_md5(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))


def _md5_of_parts(path: Path) -> str:
    """The ETag of an upload in parts of `PART_BYTES`, without `-` and the number of parts."""
    digests = b""
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            digests += hashlib.md5(part, usedforsecurity=False).digest()
    return hashlib.md5(digests, usedforsecurity=False).hexdigest()


def url_protocol(place: str) -> str:
    """The protocol of a URL, such as s3; empty for the path of a folder."""
    protocol, separator, _ = place.partition("://")
    return protocol.lower() if separator else ""


def require_driver(url: str) -> None:
    """Check, without network, that a URL can be opened here.

    Raises:
        IntegrationError: it names no place, holds a password, or has an unknown protocol; or the package for the
            protocol is missing.
    """
    import fsspec

    protocol = url_protocol(url)
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
            f"{url}: the protocol {protocol}:// is unknown. Give a folder, or a URL with s3, gs, az, ssh or hf.",
            lasting=True,
        ) from error


def open_storage(place: str | Path) -> StorageBackend:
    """The storage at a folder's path or a URL. Makes no request yet.

    Raises:
        IntegrationError: see `require_driver`.
    """
    protocol = url_protocol(str(place))
    if protocol in ("", "file", "local"):
        return LocalStorage(str(place).partition("://")[2] if protocol else place)
    return FsspecStorage(str(place))
