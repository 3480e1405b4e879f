"""A mirror holds what the run's folder holds: each file once, what was lost again, and never half of anything."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from slow_cases import slow_but

from training_lens.errors import IntegrationError
from training_lens.integrations.mirror import MirrorIntegration
from training_lens.integrations.mirror_manifest import RemoteRun
from training_lens.integrations.record import RunRecord
from training_lens.integrations.remote_run import list_remote_runs
from training_lens.integrations.storage import StorageBackend, open_storage
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import hash_file


@pytest.fixture
def run(lens_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A run of one's own, to be changed."""
    root = tmp_path / "outputs/experiments/default/runs" / lens_run.run_id
    shutil.copytree(lens_run.root, root)
    return RunFolder(root)


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "mirror")


def mirror_of(run: RunFolder, place: str) -> MirrorIntegration:
    """A new one, as another process has it."""
    integration = MirrorIntegration(RunRecord(run, {"output": {"mirror": place}}))
    integration.require()
    return integration


def remote_of(place: str) -> RemoteRun:
    (remote,) = list_remote_runs(open_storage(place))
    return remote


def check_equal(run: RunFolder, place: str, tmp_path: Path) -> None:
    """All that a run is made of is there, by its hash; and nothing else."""
    remote = remote_of(place)
    manifest = remote.read_manifest()
    assert dict(remote.list_files()) == {name: content.size for name, content in manifest.files.items()}
    back = tmp_path / "read-back"
    for name, content in manifest.files.items():
        remote.storage.get_file(remote.storage_name(name), back)
        assert hash_file(back) == content.sha256 == hash_file(run.root / name), name
    there = {p.relative_to(run.root).as_posix() for p in run.root.rglob("*") if p.is_file()}
    left_out = there - set(manifest.files)
    assert all(name.endswith(".lock") or name.startswith("tracking/") for name in left_out), left_out
    assert not any(name.startswith("tracking/") for name in manifest.files)
    assert not manifest.replacing and manifest.status == run.status


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_a_run_arrives_whole_and_once(run: RunFolder, place: str, kind: str, tmp_path: Path) -> None:
    place = place if kind == "folder" else f"memory://{uuid.uuid4()}"
    (run.tracking / "wandb").mkdir(parents=True)
    for name in ("offline.wandb", "cursor.json"):
        (run.tracking / "wandb" / name).write_text("of the tracker's own, and this machine's")
    (run.lens / ".tmp-half").write_text("half")
    mirror = mirror_of(run, place)
    assert mirror.outstanding().endswith("its end")
    mirror.deliver(ended=True)
    assert mirror.outstanding() == ""
    (run.lens / ".tmp-half").unlink()
    check_equal(run, place, tmp_path)


def test_what_is_there_is_not_sent_again(run: RunFolder, place: str, tmp_path: Path) -> None:
    mirror_of(run, place).deliver(ended=True)
    before = {path: path.stat().st_mtime_ns for path in Path(place).rglob("*.*") if path.is_file()}
    (run.reports / "note.md").write_text("new")
    again = mirror_of(run, place)
    assert again.outstanding() == "1 file (3 B)"
    again.deliver(ended=True)
    after = {path: path.stat().st_mtime_ns for path in Path(place).rglob("*.*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} == {"note.md", "mirror.json"}
    check_equal(run, place, tmp_path)


@pytest.mark.parametrize(
    "loss",
    slow_but(
        ["half a file", "the manifest"], ["everything", "a file", "half a file", "the manifest", "a damaged manifest"]
    ),
)
def test_a_storage_that_lost_something_gets_it_again(run: RunFolder, place: str, loss: str, tmp_path: Path) -> None:
    mirror_of(run, place).deliver(ended=True)
    there = Path(place) / remote_of(place).path
    file = there / "artifacts/adapter/adapter_model.safetensors"
    if loss == "everything":
        shutil.rmtree(place)
    elif loss == "a file":
        file.unlink()
    elif loss == "half a file":
        file.write_bytes(file.read_bytes()[:1000])
    elif loss == "the manifest":
        (there / "mirror.json").unlink()
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    else:
        (there / "mirror.json").write_text("{")
    mirror_of(run, place).deliver(ended=True)
    check_equal(run, place, tmp_path)


def test_a_checkpoint_that_is_thinned_goes_there_too_once_the_newer_is_there(
    run: RunFolder, place: str, tmp_path: Path
) -> None:
    mirror = mirror_of(run, place)
    mirror.deliver(ended=False)
    (old,) = run.checkpoints.iterdir()
    new = shutil.copytree(old, run.checkpoints / "step-00000099")
    mirror.deliver(ended=False)
    assert {name.split("/")[1] for name in remote_of(place).list_files() if name.startswith("checkpoints/")} == {
        old.name,
        new.name,
    }
    shutil.rmtree(old)
    mirror.deliver(ended=True)
    assert {n.split("/")[1] for n in remote_of(place).list_files() if n.startswith("checkpoints/")} == {new.name}
    check_equal(run, place, tmp_path)


def test_of_a_journal_go_whole_lines_at_a_pace(run: RunFolder, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = mirror_of(run, place)
    mirror.deliver(ended=False)
    before = run.metrics_file.read_text()
    with run.metrics_file.open("a") as file:
        file.write('{"step": 98}\n{"step": 9')
    there = Path(place) / remote_of(place).path / "logs/metrics.jsonl"
    mirror.deliver(ended=False)
    assert there.read_text() == before, "it is not due"
    mirror.deliver(ended=True)
    assert there.read_text() == before + '{"step": 98}\n'


def test_a_run_that_goes_on_gives_signs_of_life(run: RunFolder, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = mirror_of(run, place)
    mirror.deliver(ended=False)
    first = remote_of(place).read_manifest()
    monkeypatch.setattr("training_lens.integrations.mirror.EVERY", 0.0)
    mirror.deliver(ended=False)
    second = remote_of(place).read_manifest()
    assert first.status == second.status == "running" and first.version != second.version
    aged = replace(second, updated="2026-01-01T00:00:00+00:00")
    assert second.status_now == "running" and aged.status_now == "interrupted"


def test_another_copy_of_the_run_is_not_written_over(run: RunFolder, place: str, tmp_path: Path) -> None:
    mirror_of(run, place).deliver(ended=True)
    copy = RunFolder(shutil.copytree(run.root, tmp_path / "copy" / run.run_id))
    shutil.rmtree(copy.tracking)
    manifest = remote_of(place).read_manifest()
    with pytest.raises(IntegrationError, match="written by another copy of this run, on host") as caught:
        mirror_of(copy, place).deliver(ended=True)
    assert caught.value.lasting and remote_of(place).read_manifest() == manifest


def test_a_run_is_not_mirrored_onto_itself(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(IntegrationError, match="is where the run itself is kept"):
        mirror_of(run, str(tmp_path / "outputs"))


class Flaky(StorageBackend):
    """A folder whose line breaks after so many files, in the middle of the one after."""

    def __init__(self, place: str, files: int) -> None:
        super().__init__(place)
        self.inner, self.left = open_storage(place), files

    def put_file(self, local: Path, name: str) -> None:
        self.left -= 1
        if self.left < 0:
            half = Path(self.place) / name
            half.parent.mkdir(parents=True, exist_ok=True)
            half.write_bytes(local.read_bytes()[: local.stat().st_size // 2])
            raise ConnectionError("line cut")
        self.inner.put_file(local, name)

    def get_file(self, name: str, local: Path) -> None:
        self.inner.get_file(name, local)

    def list(self, folder: str = "") -> dict[str, int]:
        return self.inner.list(folder)

    def delete(self, name: str) -> None:
        self.inner.delete(name)


@pytest.mark.parametrize("files", slow_but([5], [0, 1, 5, 20]))
def test_a_line_that_is_cut_anywhere_costs_nothing_that_was_there(
    run: RunFolder, place: str, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = Flaky(place, files)
    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr("training_lens.integrations.mirror.open_storage", lambda _: flaky)
        mirror_of(run, place).deliver(ended=False)
    mirror_of(run, place).deliver(ended=True)
    check_equal(run, place, tmp_path)


def test_no_secret_goes_there(run: RunFolder, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-value")
    mirror_of(run, place).deliver(ended=True)
    for path in (p for p in [*Path(place).rglob("*"), *run.root.rglob("*")] if p.is_file()):
        assert b"planted-secret-value" not in path.read_bytes()
