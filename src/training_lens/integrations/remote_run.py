"""Finding, listing and fetching the runs of a mirror, to resume or to read them.

A mirror has the layout of the output folder: {mirror}/experiments/{experiment}/runs/{run_id}/.
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from training_lens.config.run_config import remember_mirror
from training_lens.display.progress import Progress
from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.integrations.mirror_manifest import FileDigest, MirrorManifest, RemoteRun
from training_lens.integrations.storage import StorageBackend, open_storage
from training_lens.runs.run_folder import UNFINISHED, RunFolder, parse_start_time, runs_folder
from training_lens.runs.run_listing import BROKEN, RunOverview, read_run
from training_lens.runs.run_lookup import require_usable
from training_lens.utils.files import TEMPORARY, hash_file, write_json
from training_lens.utils.formatting import format_seconds, format_size
from training_lens.utils.logging import get_logger
from training_lens.utils.names import check_experiment, check_run_id, require_contained

logger = get_logger(__name__)
RUN = re.compile(r"(?P<mirror>.+?)/(?P<run>experiments/[^/]+/runs/[^/]+)/?")
SCANS = 3  # tries while the run is still writing
WRITTEN_HERE = ("reports/", "exports/")  # into a fetched copy, where they are kept
LISTED = ("metadata/", "reports/compare.json", "reports/evaluation.json")  # what `read_run` reads
OF_UNFINISHED = ("logs/metrics.jsonl",)


def list_remote_runs(storage: StorageBackend, experiment: str | None = None) -> list[RemoteRun]:
    """The runs in a mirror, of one experiment or of all; no file is read. Invalid names are skipped with a warning."""
    experiments = storage.list_folders("experiments") if experiment is None else [experiment]
    return [
        RemoteRun(storage, f"experiments/{name}/runs/{run_id}")
        for name in _keep_valid_names(experiments, check_experiment, storage)
        for run_id in _keep_valid_names(storage.list_folders(f"experiments/{name}/runs"), check_run_id, storage)
    ]


def _keep_valid_names(names: Iterable[str], check: Callable[[str], str], storage: StorageBackend) -> Iterator[str]:
    for name in names:
        try:
            yield check(name)
        except ConfigurationError as error:
            logger.warning("skipping a folder of %s: %s", storage.place, error)


def find_remote_run(place: str, *, finished: bool | None) -> tuple[RemoteRun, MirrorManifest]:
    """The run at a place: its own (.../experiments/NAME/runs/ID), or the latest of a mirror.

    `finished` is as in `runs.run_lookup.find_run`: the run that started last is refused if it cannot be used so.
    """
    if match := RUN.fullmatch(place):
        run = RemoteRun(open_storage(match["mirror"]), match["run"])
        return run, run.read_manifest()
    storage = open_storage(place)
    runs = sorted(list_remote_runs(storage), key=lambda run: (_find_start_time(run), run.run_id), reverse=True)
    readable = _read_manifests(runs)
    last = next(readable, None)
    if last is None:
        raise CheckpointError(
            f"no run in the mirror {place} ({len(runs)} that cannot be read). Give the place that output.mirror names, "
            "or a run's own: .../experiments/NAME/runs/ID."
        )
    others = ((run.run_id, manifest.status_now) for run, manifest in readable)
    require_usable((last[0].run_id, last[1].status_now), others, f"the mirror {place}", finished)
    return last


def _read_manifests(runs: Iterable[RemoteRun]) -> Iterator[tuple[RemoteRun, MirrorManifest]]:
    """The runs with their manifests; those that cannot be read are left out with a warning."""
    for run in runs:
        try:
            yield run, run.read_manifest()
        except CheckpointError as error:
            logger.warning("skipping a run: %s", error)


def _find_start_time(run: RemoteRun) -> datetime:
    """When a run started; reads its manifest if its id does not tell. Damaged ones come first."""
    try:
        return parse_start_time(run.run_id) or run.read_manifest().start_time
    except CheckpointError:
        return datetime.min.replace(tzinfo=UTC)


def fetch_to_resume(place: str, base_output_dir: str, progress: Progress | None = None) -> RunFolder:
    """Fetch a mirrored run to resume it on this machine; atomically, every file verified by its sha256.

    The run keeps its mirror. After a kill, the next call keeps the files that are intact.

    Args:
        place: of the run, or of a mirror for its latest unfinished run.

    Raises:
        CheckpointError: there is no such run; or it is finished, still training elsewhere, here already, or damaged.
        IntegrationError: no answer.
    """
    remote, manifest = find_remote_run(place, finished=False)
    folder = runs_folder(base_output_dir, manifest.experiment) / manifest.run_id
    _require_resumable(remote, manifest, folder)
    with _lock_fetch(folder) as temporary:
        require_contained(temporary)
        manifest = _download_run(remote, temporary, progress or Progress())
        _adopt_run(temporary, remote, manifest, base_output_dir)
        temporary.rename(folder)
    remember_mirror(folder, remote.storage.place)
    return RunFolder(folder)


def fetch_to_read(
    place: str, base_output_dir: str, *, finished: bool | None, progress: Progress | None = None
) -> RunFolder:
    """An up-to-date copy in the cache of the run at a place, see `find_remote_run`; reports written into it are kept.

    Raises:
        CheckpointError: there is no such run, or it is damaged.
        IntegrationError: no answer.
    """
    remote, manifest = find_remote_run(place, finished=finished)
    cache = Path(base_output_dir) / "cache" / "runs" / manifest.experiment
    with _lock_fetch(cache / manifest.run_id) as temporary:
        if (folder := cache / manifest.run_id).is_dir():
            folder.rename(temporary)
        require_contained(temporary)
        _download_run(remote, temporary, progress or Progress())
        temporary.rename(folder)
    return RunFolder(folder)


def read_remote_runs(storage: StorageBackend, experiment: str | None, cache: Path) -> list[RunOverview]:
    """The runs of a mirror, of one experiment or of all, the newest first; reads only small files, into `cache`."""
    runs = [_read_remote(remote, cache) for remote in list_remote_runs(storage, experiment)]
    return sorted(runs, key=lambda run: (run.start_time, run.run_id), reverse=True)


def _read_remote(remote: RemoteRun, cache: Path) -> RunOverview:
    folder = cache / remote.path
    try:
        manifest = remote.read_manifest()
        wanted = (*LISTED, *(OF_UNFINISHED if manifest.status in UNFINISHED else ()))
        files = {name: content for name, content in manifest.files.items() if name.startswith(wanted)}
        _require_intact(remote, _fetch_files(remote, replace(manifest, files=files), folder, Progress()))
    except CheckpointError as error:
        folder.mkdir(parents=True, exist_ok=True)
        return replace(read_run(RunFolder(folder)), status=BROKEN, detail=str(error), mirror_place=remote.place)
    run = replace(read_run(RunFolder(folder)), mirror_place=remote.place, start_time=manifest.start_time)
    if run.status == BROKEN:
        return run
    detail = f"on host {manifest.host}, heard of {_format_age(manifest)} ago" if manifest.status == "running" else ""
    return replace(run, status=manifest.status_now, detail=detail)


def _format_age(manifest: MirrorManifest) -> str:
    return format_seconds(max(0.0, manifest.seconds_old))


def _require_resumable(remote: RemoteRun, manifest: MirrorManifest, folder: Path) -> None:
    """Require that the run can be resumed here, or say why not, and what to do."""
    if manifest.status_now not in UNFINISHED:
        raise CheckpointError(
            f"the run {manifest.run_id} is {manifest.status_now}; there is nothing to resume. To read it: "
            f"training-lens report {remote.place}"
        )
    if folder.exists():
        raise CheckpointError(
            f"the run {manifest.run_id} is here already, in {folder}. Resume that one: --resume {manifest.run_id}; "
            "or delete it first, to fetch the one of the mirror."
        )
    if manifest.status_now == "running":
        there = RunFolder(Path(manifest.folder))
        died_here = manifest.host == platform.node() and there.metadata.is_dir() and there.status != "running"
        if not died_here:
            raise CheckpointError(
                f"the run {manifest.run_id} seems to be training still, on host {manifest.host}: it was heard of "
                f"{_format_age(manifest)} ago. Stop it there, or try again in two minutes."
            )


@contextmanager
def _lock_fetch(folder: Path) -> Iterator[Path]:
    """The temporary folder that a run is fetched to, locked against other processes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{TEMPORARY}fetched-{folder.name}")
    try:
        with FileLock(f"{temporary}.lock", timeout=1.0):
            yield temporary
    except Timeout:
        raise CheckpointError(f"another process is fetching the run {folder.name}. Wait until it has it.") from None


def _download_run(remote: RemoteRun, folder: Path, progress: Progress) -> MirrorManifest:
    """Bring `folder` up to date with the mirror; returns the manifest. Refuses files that differ from it."""
    for _ in range(SCANS):
        manifest = remote.read_manifest()
        if not (wrong := _fetch_files(remote, manifest, folder, progress)):
            break  # else a running run may have replaced them: read the manifest again
    _require_intact(remote, wrong)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        name = path.relative_to(folder).as_posix()
        if name not in manifest.files and not name.startswith(WRITTEN_HERE):
            path.unlink()
    return manifest


def _require_intact(remote: RemoteRun, wrong: list[str]) -> None:
    if wrong:
        raise CheckpointError(
            f"{remote.place}: {', '.join(wrong[:3])} is missing, or differs from the sha256 in mirror.json. "
            "training-lens sync, where the run is, sends it again; or resume another run."
        )


def _fetch_files(remote: RemoteRun, manifest: MirrorManifest, folder: Path, progress: Progress) -> list[str]:
    """Fetch the files that are not here yet; returns those that are missing or wrong in the mirror."""
    left = {n: c for n, c in manifest.files.items() if not _is_intact(manifest, n, folder / n)}
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(content.size for content in left.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"the run takes {format_size(needed)}, and {folder.parent} has {format_size(free)} left. Free some space, "
            "or give another output.base_output_dir."
        )
    wrong = []
    with progress.task(f"fetching {manifest.run_id}", total=needed) as advance:
        for name, content in left.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            fetched = path.with_name(f"{TEMPORARY}{path.name}")
            try:
                if remote.storage.exists(remote.storage_name(name)):
                    remote.storage.get_file(remote.storage_name(name), fetched)
                    advance(content.size)
                if _is_intact(manifest, name, fetched):
                    fetched.replace(path)
                else:
                    wrong.append(name)
            finally:
                fetched.unlink(missing_ok=True)
    return wrong


def _is_intact(manifest: MirrorManifest, name: str, path: Path) -> bool:
    return path.is_file() and manifest.has_content(name, FileDigest(hash_file(path), path.stat().st_size))


def _adopt_run(folder: Path, remote: RemoteRun, manifest: MirrorManifest, base_output_dir: str) -> None:
    """Make a fetched run one of this machine: set its output folder, its mirror, and the mirror's cursor."""
    config = RunFolder(folder).read_metadata("config.json")
    if not isinstance(config, dict) or not isinstance(config.get("output"), dict):
        raise CheckpointError(f"{remote.place}/metadata/config.json is no run's config. Resume another run.")
    config["output"] |= {
        "base_output_dir": base_output_dir, "experiment_name": manifest.experiment, "run_id": manifest.run_id,
        "mirror": remote.storage.place,
    }  # fmt: skip
    RunFolder(folder).write_metadata("config.json", config)
    cursor = folder / "tracking" / "mirror" / "cursor.json"
    cursor.parent.mkdir(parents=True, exist_ok=True)
    write_json(cursor, {"place": remote.storage.place, "versions": [manifest.version]})
    for empty in ("checkpoints", "logs", "reports"):
        (folder / empty).mkdir(exist_ok=True)
