"""A run comes from a mirror whole or not at all; what must not be gone on with is refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from slow_cases import slow_but

from training_lens.errors import CheckpointError
from training_lens.integrations.mirror import MirrorIntegration
from training_lens.integrations.mirror_manifest import FileDigest, RemoteRun
from training_lens.integrations.record import RunRecord
from training_lens.integrations.remote_run import (
    fetch_to_read,
    fetch_to_resume,
    find_remote_run,
    list_remote_runs,
    read_remote_runs,
)
from training_lens.integrations.storage import open_storage
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import hash_file, read_json, write_json


@pytest.fixture
def run(lens_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A run that was broken off, to be changed."""
    root = tmp_path / "outputs/experiments/default/runs" / lens_run.run_id
    shutil.copytree(lens_run.root, root)
    say(RunFolder(root), status="failed")
    return RunFolder(root)


def say(run: RunFolder, **values: Any) -> None:
    write_json(run.metadata / "summary.json", run.read_metadata("summary.json") | values)


@pytest.fixture
def place(run: RunFolder, tmp_path: Path) -> str:
    """Its mirror."""
    place = str(tmp_path / "mirror")
    send(run, place)
    return place


def send(run: RunFolder, place: str) -> None:
    MirrorIntegration(RunRecord(run, {"output": {"mirror": place}})).deliver(ended=True)


def remote_of(place: str) -> RemoteRun:
    (remote,) = list_remote_runs(open_storage(place))
    return remote


def change(place: str, **values: Any) -> None:
    """Other words in mirror.json."""
    remote = remote_of(place)
    remote.write_manifest(replace(remote.read_manifest(), **values))


@pytest.fixture
def elsewhere(tmp_path: Path) -> str:
    return str(tmp_path / "elsewhere")


def test_a_fetched_run_is_the_run_and_goes_on_to_the_same_mirror(run: RunFolder, place: str, elsewhere: str) -> None:
    fetched = fetch_to_resume(f"file://{place}/", elsewhere)
    assert fetched.root == Path(elsewhere) / "experiments/default/runs" / run.run_id
    manifest = remote_of(place).read_manifest()
    for name, content in manifest.files.items():
        assert (
            name in ("metadata/config.json", "metadata/hashes.json") or hash_file(fetched.root / name) == content.sha256
        ), name
    output = read_json(fetched.metadata / "config.json")["output"]
    assert output["base_output_dir"] == elsewhere and Path(output["mirror"]) == Path(place)
    (fetched.reports / "new.md").write_text("from elsewhere")
    MirrorIntegration(RunRecord(fetched)).deliver(ended=True)
    assert "reports/new.md" in remote_of(place).read_manifest().files


@pytest.mark.slow
def test_what_the_first_machine_has_is_old_then_and_stays_here(run: RunFolder, place: str, elsewhere: str) -> None:
    fetched = fetch_to_resume(f"file://{place}", elsewhere)
    say(fetched, status="interrupted")
    MirrorIntegration(RunRecord(fetched)).deliver(ended=True)
    change(place, host="another")
    before = remote_of(place).read_manifest()
    with pytest.raises(Exception, match="written by another copy of this run, on host another"):
        send(run, place)
    assert remote_of(place).read_manifest() == before


def now() -> str:
    return datetime.now(UTC).isoformat()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"status": "finished"}, "is finished; there is nothing to resume. To read it: training-lens report"),
        ({"status": "pruned"}, "is pruned; there is nothing to resume"),
        ({"status": "running", "host": "forge"}, "seems to be training still, on host forge"),
    ],
)
def test_what_must_not_be_gone_on_with_is_refused(
    place: str, elsewhere: str, values: dict[str, Any], said: str
) -> None:
    change(place, **values, updated=now())
    with pytest.raises(CheckpointError, match=said):
        fetch_to_resume(f"{place}/{remote_of(place).path}", elsewhere)
    assert not list(Path(elsewhere).rglob("*.json"))


def test_a_run_that_died_is_fetched(place: str, elsewhere: str) -> None:
    change(place, status="running", host="forge", updated="2026-01-01T00:00:00+00:00")
    assert fetch_to_resume(place, elsewhere).status == "failed"


@pytest.mark.slow
def test_one_that_died_on_this_machine_is_fetched_at_once(place: str, elsewhere: str) -> None:
    change(place, status="running", updated=now())
    assert fetch_to_resume(place, elsewhere).root.is_dir()


def test_a_run_that_is_here_is_never_written_over(place: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is here already, .*Resume that one: --resume"):
        fetch_to_resume(place, str(tmp_path / "outputs"))


@pytest.mark.parametrize("harm", slow_but(["altered"], ["altered", "missing"]))
def test_a_damaged_file_is_named_and_what_came_is_kept(place: str, elsewhere: str, harm: str) -> None:
    remote = remote_of(place)
    file = Path(place) / remote.path / "artifacts/adapter/adapter_model.safetensors"
    whole = file.read_bytes()
    file.unlink() if harm == "missing" else file.write_bytes(whole[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing, or differs from the sha256"):
        fetch_to_resume(place, elsewhere)
    runs = Path(elsewhere) / "experiments/default/runs"
    assert [p.name for p in runs.glob("[!.]*")] == []
    kept = {p: p.stat().st_ino for p in runs.rglob("*.safetensors")}
    assert kept
    file.write_bytes(whole)
    fetched = fetch_to_resume(place, elsewhere)
    inodes = {path.stat().st_ino for path in fetched.root.rglob("*.safetensors")}
    assert set(kept.values()) < inodes and hash_file(fetched.adapter / file.name) == hash_file(file)


@pytest.mark.slow
def test_while_a_file_is_written_over_both_contents_are_right(place: str, elsewhere: str) -> None:
    remote = remote_of(place)
    file = Path(place) / remote.path / "logs/metrics.jsonl"
    old = file.read_bytes()
    file.write_bytes(old + b'{"step": 99}\n')
    change(place, replacing={"logs/metrics.jsonl": FileDigest(hash_file(file), file.stat().st_size)})
    assert read_metrics(fetch_to_resume(place, elsewhere).metrics_file)[-1] == {"step": 99}
    file.write_bytes(old)
    assert fetch_to_read(place, elsewhere, finished=False).metrics_file.read_bytes() == old


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/../../../outside"])
def test_a_manifest_that_leads_outside_is_refused(place: str, elsewhere: str, name: str) -> None:
    remote = remote_of(place)
    values = asdict(remote.read_manifest())
    values["files"][name] = {"sha256": "0" * 64, "size": 1}
    (Path(place) / remote.path / "mirror.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="outside the run"):
        fetch_to_resume(f"{place}/{remote.path}", elsewhere)


def test_the_latest_of_a_mirror_is_the_run_that_started_last_or_refused(run: RunFolder, place: str) -> None:
    later = RunFolder(shutil.copytree(run.root, run.root.with_name("20990101T000000Z-aaaa")))
    shutil.rmtree(later.tracking)
    say(later, status="finished")
    send(later, place)
    with pytest.raises(CheckpointError, match=rf"aaaa \(finished\); .* The last unfinished one is {run.run_id}\."):
        find_remote_run(place, finished=False)
    assert (
        find_remote_run(place, finished=True)[0].run_id
        == find_remote_run(place, finished=None)[0].run_id
        == later.run_id
    )
    change_all = [replace(r.read_manifest(), status="pruned") for r in list_remote_runs(open_storage(place))]
    for remote, manifest in zip(list_remote_runs(open_storage(place)), change_all, strict=True):
        remote.write_manifest(manifest)
    with pytest.raises(
        CheckpointError, match=r"aaaa \(pruned\); expected one .* No run in the mirror .* is unfinished\."
    ):
        find_remote_run(place, finished=False)


@pytest.mark.slow
@pytest.mark.parametrize(("heard", "is_last"), [("2026-01-01T00:00:00+00:00", False), (None, True)])
def test_a_run_whose_id_tells_no_time_is_as_late_as_it_was_heard_of(
    run: RunFolder, place: str, tmp_path: Path, heard: str | None, is_last: bool
) -> None:
    named = RunFolder(shutil.copytree(run.root, run.root.with_name("trial-0003-5f3a")))
    shutil.rmtree(named.tracking)
    send(named, place)
    remote = next(remote for remote in list_remote_runs(open_storage(place)) if remote.run_id == named.run_id)
    if heard:
        remote.write_manifest(replace(remote.read_manifest(), updated=heard))
    order = [named.run_id, run.run_id] if is_last else [run.run_id, named.run_id]
    assert find_remote_run(place, finished=None)[0].run_id == order[0]
    assert [found.run_id for found in read_remote_runs(open_storage(place), None, tmp_path / "cache")] == order


def test_a_place_that_is_no_run_says_how_to_look(place: str) -> None:
    with pytest.raises(CheckpointError, match=r"is no mirrored run: .* training-lens experiment list --mirror"):
        find_remote_run(f"{place}/experiments/default/runs/nothing", finished=None)


def test_a_copy_to_read_is_brought_up_to_date(run: RunFolder, place: str, elsewhere: str) -> None:
    copy = fetch_to_read(place, elsewhere, finished=None)
    assert copy.root == Path(elsewhere) / "cache/runs/default" / run.run_id
    (copy.reports / "of-the-copy.md").write_text("kept")
    (run.metadata / "tags.json").write_text('["new"]')
    (gone,) = run.lens.glob("loss/*")
    gone.unlink()
    send(run, place)
    again = fetch_to_read(place, elsewhere, finished=None)
    assert (again.metadata / "tags.json").read_text() == '["new"]' and (again.reports / "of-the-copy.md").is_file()
    assert not (again.lens / "loss" / gone.name).exists()


def test_the_runs_of_a_mirror_are_read_from_their_small_files(run: RunFolder, place: str, tmp_path: Path) -> None:
    (Path(place) / "experiments/default/runs/half").mkdir(parents=True)
    (Path(place) / "experiments/default/runs/half/file").write_text("of a first upload")
    found = {r.run_id: r for r in read_remote_runs(open_storage(place), None, tmp_path / "cache")}
    assert found["half"].status == "broken" and "no mirror.json" in found["half"].detail
    one = found[run.run_id]
    steps, peft = run.read_metadata("summary.json")["steps"], run.read_metadata("config.json")["peft"]
    assert one.status == "failed" and one.metrics["steps"] == steps and one.config["peft.r"] == peft["r"] == 4
    assert one.as_json()["path"] == f"{place}/experiments/default/runs/{run.run_id}"
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


OUTSIDE = ["../../../precious", "/precious", "..", ".tmp-x", "a\u202eb", "x" * 101, 7, None, ["a"]]


@pytest.mark.parametrize("key", ["run_id", "experiment"])
@pytest.mark.parametrize("name", slow_but(["../../../precious", "/precious", 7], OUTSIDE))
def test_a_manifest_names_no_folder_but_its_own(
    place: str, elsewhere: str, tmp_path: Path, key: str, name: object
) -> None:
    precious = tmp_path / "precious"
    (precious / "metadata").mkdir(parents=True)
    (precious / "file").write_text("mine")
    remote = remote_of(place)
    values = asdict(remote.read_manifest())
    for wrong in (str(precious) if name == "/precious" else name, "another"):
        write_json(Path(place) / remote.path / "mirror.json", {**values, key: wrong})
        for fetch in (fetch_to_resume, lambda *given: fetch_to_read(*given, finished=None)):
            with pytest.raises(CheckpointError, match=r"mirror.json (is damaged|says that it is the run)"):
                fetch(f"file://{place}/{remote.path}", elsewhere)
    assert (precious / "file").read_text() == "mine" and not Path(elsewhere).exists()


WRONG = [
    ("status", "hacked"), ("host", 5), ("folder", None), ("updated", "2026-01-01T00:00:00"), ("version", []),
    ("files", {"a": {"sha256": "x", "size": 1}}), ("files", {"a": {"sha256": "0" * 64, "size": 10**400}}),
    ("replacing", {"a": {"sha256": "0" * 64, "size": -1}}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), slow_but(WRONG[::4], WRONG))
def test_a_manifest_of_other_values_is_damaged(place: str, elsewhere: str, key: str, value: object) -> None:
    remote = remote_of(place)
    values = {**asdict(remote.read_manifest()), key: value}
    write_json(Path(place) / remote.path / "mirror.json", values)
    with pytest.raises(CheckpointError, match=r"mirror.json is damaged"):
        fetch_to_resume(f"{place}/{remote.path}", elsewhere)


def test_folders_of_a_mirror_that_can_be_no_run_are_passed_over(place: str) -> None:
    runs = Path(place) / remote_of(place).path / ".."
    for name in (".tmp-x", "a\u202eb", "-x"):
        (runs.resolve() / name).mkdir()
        (runs.resolve() / name / "mirror.json").write_text("{}")
    assert remote_of(place).read_manifest()


def test_a_fetched_folder_is_written_through_no_link(place: str, elsewhere: str, tmp_path: Path) -> None:
    remote = remote_of(place)
    waiting = Path(elsewhere) / "experiments/default/runs" / f".tmp-fetched-{remote.run_id}"
    waiting.mkdir(parents=True)
    (precious := tmp_path / "precious").mkdir()
    (waiting / "metadata").symlink_to(precious)
    with pytest.raises(CheckpointError, match="symbolic link"):
        fetch_to_resume(place, elsewhere)
    assert not list(precious.iterdir())
