"""A storage gives back what it took, whichever it is; what is wrong with one is a line that says what to do."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from training_lens.errors import IntegrationError
from training_lens.integrations import ActivationStorage, LocalStorage, StorageBackend, open_storage
from training_lens.integrations import storage as storage_module
from training_lens.runs.run_folder import RunFolder


class Shelf(StorageBackend):
    """A user's own: the four methods alone."""

    def __init__(self) -> None:
        super().__init__("shelf")
        self.held: dict[str, bytes] = {}

    def put_file(self, local: Path, name: str) -> None:
        self.held[name] = local.read_bytes()

    def get_file(self, name: str, local: Path) -> None:
        if name not in self.held:
            raise IntegrationError(f"{name}: there is no such file.")
        local.write_bytes(self.held[name])

    def list(self, folder: str = "") -> dict[str, int]:
        return {n: len(c) for n, c in self.held.items() if not folder or n.startswith(f"{folder}/")}

    def delete(self, name: str) -> None:
        self.held.pop(name, None)


@pytest.fixture(params=["folder", "file://", "memory://", "own"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> StorageBackend:
    places = {
        "folder": tmp_path / "there",
        "file://": f"file://{tmp_path}/there",
        "memory://": f"memory://{uuid.uuid4()}",
    }
    return Shelf() if request.param == "own" else open_storage(places[request.param])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"content" * 1000)
    return tmp_path / "file"


def test_what_is_put_comes_back(storage: StorageBackend, file: Path, tmp_path: Path) -> None:
    assert storage.list() == {} and storage.list_folders() == [] and not storage.exists("a/b/one")
    storage.put_file(file, "a/b/one")
    storage.put_file(file, "a/two")
    storage.put_file(file, "c/three")
    assert storage.list() == {"a/b/one": 7000, "a/two": 7000, "c/three": 7000}
    assert storage.list("a") == {"a/b/one": 7000, "a/two": 7000}
    assert storage.list_folders() == ["a", "c"] and storage.list_folders("a") == ["b"]
    storage.get_file("a/b/one", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    storage.delete("a/two")
    storage.delete("a/two")
    assert not storage.exists("a/two") and storage.exists("a/b/one")


def test_another_content_is_found_also_of_the_same_size(storage: StorageBackend, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes()[:-1] + b"!")
    storage.put_file(file, "one")
    assert storage.verify("one", file) and not storage.verify("one", other)
    storage.put_file(other, "one")
    assert storage.verify("one", other) and not storage.verify("one", file)


def test_a_file_that_is_not_there_leaves_nothing_here(storage: StorageBackend, tmp_path: Path) -> None:
    with pytest.raises(IntegrationError, match="no/such"):
        storage.get_file("no/such", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_there(small_disk: Path, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"1" * 10_000)
    large.write_bytes(b"2" * 100_000)
    storage = LocalStorage(small_disk)
    storage.put_file(small, "file")
    with pytest.raises(OSError, match="No space left"):
        storage.put_file(large, "file")
    assert storage.verify("file", small) and [path.name for path in small_disk.iterdir()] == ["file"]


def test_a_servers_checksum_is_believed_only_where_it_is_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = file.read_bytes()
    whole = hashlib.md5(content).hexdigest()
    assert storage_module.is_checksum_of({"ETag": f'"{whole}"'}, file)
    assert storage_module.is_checksum_of({"md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode()}, file)
    monkeypatch.setattr(storage_module, "PART_BYTES", 3000)
    parts = b"".join(hashlib.md5(content[i : i + 3000]).digest() for i in range(0, len(content), 3000))
    assert storage_module.is_checksum_of({"ETag": f'"{hashlib.md5(parts).hexdigest()}-3"'}, file)
    for info in ({}, {"ETag": '"0"'}, {"ETag": f'"{whole[::-1]}"'}, {"ETag": f'"{whole}-3"'}, {"md5Hash": whole}):
        assert not storage_module.is_checksum_of(info, file)


@pytest.mark.parametrize(
    ("place", "package", "said"),
    [
        ("gs://bucket/path", "gcsfs", r"pip install 'training-lens\[gcs\]'"),
        ("az://container/path", "adlfs", r"pip install 'training-lens\[azure\]'"),
        ("s3://", None, "s3:// names no place; give one, such as s3://bucket/path"),
        ("nowhere://x", None, "the protocol nowhere:// is unknown. Give a folder, or a URL with s3"),
        ("ssh://me:hunter22@host/x", None, "Leave it out, and set the environment variables"),
    ],
)
def test_a_place_that_cannot_be_opened_says_what_to_do(place: str, package: str | None, said: str) -> None:
    if package and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(IntegrationError, match=said) as caught:
        open_storage(place)
    assert caught.value.lasting and "hunter22" not in str(caught.value)


def test_tensors_by_step_come_back(storage: StorageBackend) -> None:
    mine = ActivationStorage(storage, "mine")
    tensors = {"layer.0": torch.randn(3, 4), "layer.1": torch.arange(5)}
    mine.save(20, tensors)
    mine.save(3, {"layer.0": torch.zeros(2)})
    assert mine.steps() == (3, 20) and ActivationStorage(storage).steps() == ()
    loaded = mine.load(20)
    assert set(loaded) == set(tensors) and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with pytest.raises(IntegrationError, match="step-00000004"):
        mine.load(4)


def test_a_runs_snapshots_are_read_where_they_are(finished_run: RunFolder) -> None:
    from training_lens.core.snapshots import list_snapshots, read_snapshot

    stored = ActivationStorage(open_storage(finished_run.lens), "adapters")
    here: dict[int, Any] = list_snapshots(finished_run.lens / "adapters")
    assert stored.steps() == tuple(here) != ()
    step, path = here.popitem()
    assert all(torch.equal(stored.load(step)[name], tensor) for name, tensor in read_snapshot(path).items())


MISPLACED = [
    "",
    " ",
    "/etc/passwd",
    "../out",
    "a/../../out",
    "a/..",
    "C:/x",
    "c:x",
    "a\\b",
    "a\0b",
    "//host/x",
    "a//b",
    "./a",
]


@pytest.mark.parametrize("name", MISPLACED)
@pytest.mark.parametrize("kind", ["folder", "memory://"])
def test_names_that_leave_a_storage_are_refused(tmp_path: Path, file: Path, kind: str, name: str) -> None:
    storage = open_storage(tmp_path / "there" if kind == "folder" else f"memory://{uuid.uuid4()}")
    storage.put_file(str(file), "a/b")
    calls = [lambda: storage.put_file(file, name), lambda: storage.get_file(name, tmp_path / "back")]
    calls += [lambda: storage.delete(name), lambda: storage.exists(name), lambda: storage.verify(name, file)]
    calls += [lambda: storage.list(name), lambda: storage.list_folders(name)] if name else []
    for call in calls:
        with pytest.raises(IntegrationError, match=r"names nothing in this storage: .* Give a relative name"):
            call()
    assert list(storage.list()) == ["a/b"] and sorted(path.name for path in tmp_path.iterdir() if path != file) in (
        [], ["there"],
    )  # fmt: skip


def test_symbolic_links_do_not_lead_out_of_a_folder(tmp_path: Path, file: Path) -> None:
    storage = LocalStorage(str(tmp_path / "there"))
    storage.put_file(file, "a/b")
    (tmp_path / "there/a/file").symlink_to(file)
    (tmp_path / "there/out").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "there/in").symlink_to(tmp_path / "there/a", target_is_directory=True)
    for name in ("a/file", "out", "out/file", "out/new"):
        for call in (lambda n=name: storage.put_file(file, n), lambda n=name: storage.delete(n)):  # type: ignore[misc]
            with pytest.raises(IntegrationError, match="a symbolic link leads out of the folder"):
                call()
    storage.get_file("in/b", str(tmp_path / "back"))
    assert list(storage.list()) == ["a/b"] and storage.verify("in/b", str(file))
