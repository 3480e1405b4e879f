"""Checks a run's files, for `doctor RUN`: what is damaged, what can be resumed, and what can be repaired."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from training_lens.config.run_config import read_run_config
from training_lens.core.capture_files import LISTING, read_listing, read_manifest
from training_lens.core.lens_store import COST, LensStore, read_cost
from training_lens.data.token_cache import open_cached_split
from training_lens.errors import CheckpointError, TrainingLensError
from training_lens.models.base_record import base_files, check_base, require_local_folder
from training_lens.runs.checkpoint_format import list_checkpoints, newest_intact_checkpoint
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.training.plan import token_cache_folder
from training_lens.training.run_repair import (
    drop_damaged_checkpoints,
    drop_damaged_states,
    find_checkpoint_fault,
    read_fingerprint,
    rebuild_token_cache,
    record_base,
    record_hashes_again,
    relocate_config,
    restore_run_adapter,
    rewrite_capture_listing,
    rewrite_lens_manifest,
    rewrite_summary,
    rewrite_tokenizer,
)
from training_lens.utils.files import hash_file
from training_lens.utils.formatting import describe_error
from training_lens.utils.integrity import (
    find_damaged_files,
    read_recorded_hashes,
    read_sealed,
    require_intact,
    write_sealed,
)
from training_lens.utils.limits import read_text
from training_lens.utils.machine import MachineCheck

KEPT_ELSEWHERE = "Restore a copy of it; or, if you changed it on purpose, accept it as it is: --accept."


@dataclass(frozen=True)
class RunPart:
    """A part of a run. `look` describes it, or raises if it is damaged; `repair` restores it; `remedy`: what to do."""

    name: str
    look: Callable[[RunFolder], str]
    repair: Callable[[RunFolder], object] | None
    remedy: str


def check_run(run: RunFolder, *, verify: bool = False, repair: bool = False) -> Iterator[MachineCheck]:
    """Check all parts of a run.

    Args:
        verify: compare the base by its whole files, if their SHA-256 is known, not by samples.
        repair: repair damaged parts where possible; the remedy says why one could not be repaired.
    """
    for part in (*PARTS, *([WHOLE_BASE] if verify else [])):
        check = _check_part(part, run)
        if repair and part.repair and not check.ok:
            check = _repair_part(part, run, check)
        yield check


def _check_part(part: RunPart, run: RunFolder) -> MachineCheck:
    try:
        return MachineCheck(part.name, True, part.look(run))
    except (TrainingLensError, OSError, ValueError, KeyError, TypeError) as error:
        return MachineCheck(part.name, False, describe_error(error), part.remedy)


def _repair_part(part: RunPart, run: RunFolder, damaged: MachineCheck) -> MachineCheck:
    assert part.repair is not None
    try:
        part.repair(run)
    except (TrainingLensError, OSError, ValueError, KeyError, TypeError) as error:
        return replace(damaged, remedy=f"It could not be repaired: {describe_error(error)}")
    again = _check_part(part, run)
    return replace(again, found=f"repaired: {again.found}") if again.ok else again


def _require_undamaged(run: RunFolder, within: str) -> None:
    if damaged := list(find_damaged_files(run.root, within)):
        raise CheckpointError("; ".join(damaged))


def _check_record(run: RunFolder) -> str:
    files = read_recorded_hashes(run.root)
    return f"{len(files)} files" if files else "none: an earlier version wrote the run"


def _check_metadata(run: RunFolder) -> str:
    _require_undamaged(run, "metadata")
    read_run_config(run)
    return "as the run wrote it"


def _check_base(run: RunFolder) -> str:
    model = read_run_config(run).model
    if check_base(run.base_record, model):
        return f"{model.id}: the one that the run trained on"
    if not run.base_record.is_file():
        raise CheckpointError(
            f"{run.base_record} is missing: there is no record of the weights that the run trained on"
        )
    return f"{model.id}: not compared, as its files are not here or not recorded"


def _check_whole_base(run: RunFolder) -> str:
    model, record = read_run_config(run).model, read_sealed(run.base_record)
    files = base_files(require_local_folder(model))
    recorded: dict[str, str] = record.get("sha256", {})
    found = {path.name: hash_file(path) for path in files}
    if changed := [name for name in found if recorded.get(name, found[name]) != found[name]]:
        raise CheckpointError(f"{', '.join(changed)} of {model.id} changed since the run began")
    _check_base(run)
    write_sealed(run.base_record, {**record, "sha256": found})
    fresh = len(found.keys() - recorded.keys())
    return f"{len(found)} files compared whole" + (f", {fresh} recorded for the first time" if fresh else "")


def _check_checkpoints(run: RunFolder) -> str:
    folders = list_checkpoints(run.checkpoints)
    problems = [problem for folder in folders if (problem := find_checkpoint_fault(folder))]
    found = newest_intact_checkpoint(run.checkpoints)
    resume_point = f"the newest intact one is of step {found[1].step}" if found else "a resume starts over"
    if problems:
        raise CheckpointError(f"{' '.join(problems)} {resume_point}")
    return f"{len(folders)}; {resume_point}"


def _check_states(run: RunFolder) -> str:
    folders = list_checkpoints(run.states)
    if problems := [problem for folder in folders if (problem := find_checkpoint_fault(folder))]:
        raise CheckpointError(" ".join(problems))
    return f"{len(folders)}" if folders else "none: a replay begins at the start"


def _check_adapter(run: RunFolder) -> str:
    _require_undamaged(run, "artifacts/adapter")
    if run.status == "finished" and not run.adapter.is_dir():
        raise CheckpointError(f"{run.adapter} is missing")
    return "as the run wrote it" if run.adapter.is_dir() else "none yet"


def _check_scaled_adapter(run: RunFolder) -> str:
    if not run.scaled.is_dir():
        return "none: the adapter answers as trained"
    require_intact(run.served_adapter)
    return f"times {run.adapter_scale:g}"


def _check_tokenizer(run: RunFolder) -> str:
    _require_undamaged(run, "artifacts/tokenizer")
    return "as the run wrote it" if run.tokenizer.is_dir() else "none yet"


def _check_journal(run: RunFolder) -> str:
    if not run.metrics_file.is_file():
        return "none yet"
    lines = read_text(run.metrics_file).splitlines()
    lost = len(lines) - len(read_metrics(run.metrics_file))
    if lost > (0 if run.status == "finished" else 1):  # a kill may cut the last one short
        raise CheckpointError(f"{lost} of {len(lines)} lines of {run.metrics_file} are damaged and skipped")
    return f"{len(lines)} lines"


def _check_lens(run: RunFolder) -> str:
    if not run.lens.is_dir():
        return "no captures"
    return f"{len(read_manifest(run.lens).modules)} modules"


def _check_captures(run: RunFolder) -> str:
    if not run.lens.is_dir():
        return "no captures"
    store = LensStore(run.lens)
    for name in store.tables():
        if list((run.lens / name).glob("*.parquet")):
            store.table(name)
        store.snapshot_steps(name)
    if store.damaged:
        raise CheckpointError(f"damaged or missing, and skipped: {', '.join(map(str, store.damaged))}")
    return f"{len(store.tables())} tables"


def _check_capture_listing(run: RunFolder) -> str:
    if not (run.lens / LISTING).is_file():
        return "none: no captures, or an earlier version wrote them"
    return f"{len(read_listing(run.lens))} files"


def _check_token_cache(run: RunFolder) -> str:
    config, fingerprint = relocate_config(run, read_run_config(run)), read_fingerprint(run)
    dataset = open_cached_split(fingerprint, token_cache_folder(config))
    return f"{len(dataset)} examples" if dataset else "not here: made when needed"


LEFT_OUT = "Only a copy can restore it; everything else is readable without it."
PARTS = (
    RunPart("hashes", _check_record, record_hashes_again, "--repair records the files as they are now."),
    RunPart("metadata", _check_metadata, None, KEPT_ELSEWHERE),
    RunPart("checkpoints", _check_checkpoints, drop_damaged_checkpoints, "--repair deletes the damaged ones."),
    RunPart("summary", lambda run: run.status, rewrite_summary, "--repair writes it from the newest checkpoint."),
    RunPart("base", _check_base, record_base, "Put the base back, or take this one: model.accept_changed_base=true."),
    RunPart("adapter", _check_adapter, restore_run_adapter, "--repair takes it from its checkpoint."),
    RunPart(
        "scaled adapter",
        _check_scaled_adapter,
        lambda run: shutil.rmtree(run.scaled),
        "--repair deletes it: the adapter then answers as trained.",
    ),
    RunPart("tokenizer", _check_tokenizer, rewrite_tokenizer, "--repair writes it from the base's."),
    RunPart("journal", _check_journal, None, LEFT_OUT),
    RunPart("lens", _check_lens, rewrite_lens_manifest, "--repair writes lens.json from the adapter and the tables."),
    RunPart(
        "lens cost",
        lambda run: f"{sum(read_cost(run.lens).values()):.1f} s" if run.lens.is_dir() else "no captures",
        lambda run: (run.lens / COST).unlink(),
        "--repair deletes it: no file needs it.",
    ),
    RunPart(
        "lens files", _check_capture_listing, rewrite_capture_listing, "--repair lists the captures that are there."
    ),
    RunPart("captures", _check_captures, None, LEFT_OUT),
    RunPart(
        "states", _check_states, drop_damaged_states, "--repair deletes the damaged ones: replays begin at others."
    ),
    RunPart("token cache", _check_token_cache, rebuild_token_cache, "--repair makes it again, as does the next run."),
)
WHOLE_BASE = RunPart("whole base", _check_whole_base, None, "Put the base back that the run trained on.")
