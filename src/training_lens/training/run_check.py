"""A run's files looked through: what is damaged, what can be resumed; and what can be made anew of the rest."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training_lens.analysis.saved_adapters import open_adapter
from training_lens.config.run_config import RESUME_KEYS, locate_outputs, open_run_config, read_run_config
from training_lens.config.schema import TrainingConfig
from training_lens.core import table_names as tables
from training_lens.core.capture_files import LISTING, captures_in, read_listing, write_listing
from training_lens.core.lens_manifest import LENS, read_manifest, write_manifest
from training_lens.core.lens_store import COST, LensStore, read_cost, table_folders
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import DataType, LensManifest
from training_lens.data.token_cache import cached_folder, open_cached
from training_lens.errors import CheckpointError, DamagedFileError, TrainingLensError
from training_lens.models.adapter_files import saved_shapes
from training_lens.models.checkpoint_files import stored_tensors
from training_lens.models.stored import base_files, base_record, check_base, local_folder, require_local_folder
from training_lens.models.tokenizer_files import save_tokenizer
from training_lens.runs.checkpoint_format import (
    checkpoint_folder,
    list_checkpoints,
    newest_intact_checkpoint,
    verify_checkpoint,
)
from training_lens.runs.run_folder import RunFolder, read_metrics
from training_lens.training.loop.checkpoint_manager import ADAPTER, STATE
from training_lens.training.plan import cache_of, read_tokenizer
from training_lens.training.run import TrainingWrapper
from training_lens.training.summary import TrainingSummary, write_summary
from training_lens.utils.files import atomic_folder, hash_file, list_files, read_json
from training_lens.utils.formatting import describe_error
from training_lens.utils.integrity import (
    CHECKSUM,
    RECORDS,
    find_damaged_files,
    read_recorded_hashes,
    read_sealed,
    record_hashes,
    write_sealed,
)
from training_lens.utils.limits import read_text
from training_lens.utils.machine import MachineCheck

KEPT_ELSEWHERE = "Put back a copy of it; or, where you changed it on purpose, take it as it is: --accept."
OWN_HASH = ("metadata/summary.json", "metadata/base.json", f"lens/{LENS}", f"lens/{COST}", f"lens/{LISTING}")
REWRITTEN = ("metadata/process.json", "metadata/tags.json")


@dataclass(frozen=True)
class Part:
    """A part of a run: what of it is found (an error where it is damaged), how it is made anew, or what else helps."""

    name: str
    look: Callable[[RunFolder], str]
    repair: Callable[[RunFolder], object] | None
    remedy: str


def check_run(run: RunFolder, *, verify: bool = False, repair: bool = False) -> Iterator[MachineCheck]:
    """All of a run, one part after the other.

    Args:
        verify: compare the base by its whole files, where their SHA-256 is known, not by samples.
        repair: make anew what is damaged and can be; what could not be done is in the remedy.
    """
    for part in (*PARTS, *([WHOLE_BASE] if verify else [])):
        check = _check(part, run)
        if repair and part.repair and not check.ok:
            check = _repair(part, run, check)
        yield check


def _check(part: Part, run: RunFolder) -> MachineCheck:
    try:
        return MachineCheck(part.name, True, part.look(run))
    except (TrainingLensError, OSError, ValueError, KeyError, TypeError) as error:
        return MachineCheck(part.name, False, describe_error(error), part.remedy)


def _repair(part: Part, run: RunFolder, damaged: MachineCheck) -> MachineCheck:
    assert part.repair is not None
    try:
        part.repair(run)
    except (TrainingLensError, OSError, ValueError, KeyError, TypeError) as error:
        return replace(damaged, remedy=f"It could not be made anew: {describe_error(error)}")
    again = _check(part, run)
    return replace(again, found=f"made anew: {again.found}") if again.ok else again


def accept_run(run: RunFolder) -> None:
    """Take all files of a run as they are now: their hashes are recorded anew."""
    for name in OWN_HASH:
        if (path := run.root / name).is_file():
            write_sealed(path, {key: value for key, value in read_json(path).items() if key != CHECKSUM})
    if (run.lens / LISTING).is_file():
        _list_captures_again(run)
    _record_anew(run)


def _record_anew(run: RunFolder) -> None:
    (run.root / RECORDS[0]).unlink(missing_ok=True)
    files = [*run.metadata.glob("*.json"), *list_files(run.adapter), *list_files(run.tokenizer)]
    skipped = {run.root / name for name in (*OWN_HASH, *REWRITTEN)}
    record_hashes(run.root, [path for path in files if path not in skipped])


def _require_undamaged(run: RunFolder, within: str) -> None:
    if damaged := list(find_damaged_files(run.root, within)):
        raise CheckpointError("; ".join(damaged))


def _look_at_record(run: RunFolder) -> str:
    files = read_recorded_hashes(run.root)
    return f"{len(files)} files" if files else "none: an earlier version wrote the run"


def _look_at_metadata(run: RunFolder) -> str:
    _require_undamaged(run, "metadata")
    read_run_config(run)
    return "as the run wrote it"


def _look_at_base(run: RunFolder) -> str:
    model = read_run_config(run).model
    if check_base(run.base_record, model):
        return f"{model.id}: the one that the run trained on"
    if not run.base_record.is_file():
        raise CheckpointError(f"{run.base_record} is missing: nothing says which weights the run trained on")
    return f"{model.id}: not compared, its files are not here or not recorded"


def _record_base(run: RunFolder) -> None:
    """Where the record is lost, the base of today is taken for that of the run."""
    try:
        read_sealed(run.base_record)
    except (DamagedFileError, FileNotFoundError):
        write_sealed(run.base_record, base_record(read_run_config(run).model))


def _look_at_whole_base(run: RunFolder) -> str:
    model, record = read_run_config(run).model, read_sealed(run.base_record)
    files = base_files(require_local_folder(model))
    recorded: dict[str, str] = record.get("sha256", {})
    found = {path.name: hash_file(path) for path in files}
    if changed := [name for name in found if recorded.get(name, found[name]) != found[name]]:
        raise CheckpointError(f"{', '.join(changed)} of {model.id} changed since the run began")
    _look_at_base(run)
    write_sealed(run.base_record, {**record, "sha256": found})
    fresh = len(found.keys() - recorded.keys())
    return f"{len(found)} files compared whole" + (f", {fresh} for the first time: recorded now" if fresh else "")


def _look_at_checkpoints(run: RunFolder) -> str:
    folders = list_checkpoints(run.checkpoints)
    problems = [problem for folder in folders if (problem := _problem_of(folder))]
    found = newest_intact_checkpoint(run.checkpoints)
    way = f"the newest intact one is of step {found[1].step}" if found else "a resume begins anew"
    if problems:
        raise CheckpointError(f"{' '.join(problems)} {way}")
    return f"{len(folders)}; {way}"


def _problem_of(checkpoint: Path) -> str:
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError as error:
        return str(error)
    return ""


def _drop_damaged_checkpoints(run: RunFolder) -> None:
    for folder in filter(_problem_of, list_checkpoints(run.checkpoints)):
        shutil.rmtree(folder)


def _look_at_summary(run: RunFolder) -> str:
    return run.status


def _summarize_again(run: RunFolder) -> None:
    """From the newest checkpoint and the journal; what only the process knew (its peak memory) is 0."""
    found = newest_intact_checkpoint(run.checkpoints)
    if found is None:
        raise CheckpointError("no checkpoint is intact, and nothing else says how far the run came.")
    state, lines = read_json(found[0] / STATE), read_metrics(run.metrics_file) if run.metrics_file.is_file() else []
    shapes = saved_shapes(found[0] / ADAPTER)
    trainable = sum(math.prod(shape) for shape in shapes.values())
    base = local_folder(read_run_config(run).model)
    frozen = sum(math.prod(t.shape) for t in stored_tensors(base).values()) if base else 0
    is_finished = any(name.startswith("artifacts/tokenizer/") for name in read_recorded_hashes(run.root))
    summary = TrainingSummary(
        run_dir=str(run.root),
        status="finished" if is_finished else "interrupted",
        steps=state["step"],
        epochs=max((line.get("epoch") or 0.0 for line in lines if line["step"] <= state["step"]), default=0.0),
        train_loss=state["loss_sum"] / state["supervised_tokens"],
        validation_loss=state["best_loss"],
        base_validation_loss=state["base_validation_loss"],
        supervised_tokens=state["supervised_tokens"],
        tokens=state["tokens"],
        tokens_per_second=state["tokens"] / state["seconds"],
        seconds=state["seconds"],
        trainable_parameters=trainable,
        total_parameters=trainable + frozen,
        adapter_step=state["best_step"] or state["step"],
        micro_batch_tokens=state["micro_batch_tokens"],
        lens_seconds=sum(read_cost(run.lens).values()) if run.lens.is_dir() else 0.0,
    )
    write_summary(run, summary)


def _look_at_adapter(run: RunFolder) -> str:
    _require_undamaged(run, "artifacts/adapter")
    if run.status == "finished" and not run.adapter.is_dir():
        raise CheckpointError(f"{run.adapter} is missing")
    return "as the run wrote it" if run.adapter.is_dir() else "none yet"


def _restore_adapter(run: RunFolder) -> None:
    step = int(run.read_metadata("summary.json")["adapter_step"])
    source = checkpoint_folder(run.checkpoints, step) / ADAPTER
    verify_checkpoint(source.parent)
    with atomic_folder(run.adapter, existing="replace") as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        _require_recorded(folder, run, "artifacts/adapter")


def _require_recorded(folder: Path, run: RunFolder, name: str) -> None:
    """Refuse what was made anew and is not, byte for byte, what was lost."""
    for recorded, sha256 in read_recorded_hashes(run.root).items():
        path = folder / recorded.removeprefix(f"{name}/")
        if recorded.startswith(f"{name}/") and not (path.is_file() and hash_file(path) == sha256):
            raise CheckpointError(f"{recorded} came out otherwise than it was.")


def _look_at_tokenizer(run: RunFolder) -> str:
    _require_undamaged(run, "artifacts/tokenizer")
    return "as the run wrote it" if run.tokenizer.is_dir() else "none yet"


def _save_tokenizer_again(run: RunFolder) -> None:
    config = open_run_config(run, {}, "model.trust_remote_code")
    with atomic_folder(run.tokenizer, existing="replace") as folder:
        _, tokenizer = read_tokenizer(config)
        save_tokenizer(tokenizer, folder, require_local_folder(config.model), config.model.trust_remote_code)
        _require_recorded(folder, run, "artifacts/tokenizer")


def _look_at_journal(run: RunFolder) -> str:
    if not run.metrics_file.is_file():
        return "none yet"
    lines = read_text(run.metrics_file).splitlines()
    lost = len(lines) - len(read_metrics(run.metrics_file))
    if lost > (0 if run.status == "finished" else 1):  # a kill may cut the last one short
        raise CheckpointError(f"{lost} of {len(lines)} lines of {run.metrics_file} are damaged, and left out")
    return f"{len(lines)} lines"


def _look_at_lens(run: RunFolder) -> str:
    if not run.lens.is_dir():
        return "no captures"
    return f"{len(read_manifest(run.lens).modules)} modules"


def _index_lens_again(run: RunFolder) -> None:
    """From the newest adapter, the tables that are there, and the run's config; what the probe held is lost."""
    folders = [folder / ADAPTER for folder in reversed(list_checkpoints(run.checkpoints))]
    adapter = next((folder for folder in folders if folder.is_dir()), run.adapter)
    config, lines = read_run_config(run), [line for line in read_metrics(run.metrics_file) if line.get("epoch")]
    settings: dict[str, Any] = {"max_grad_norm": config.training.max_grad_norm, "lr": config.training.lr}
    if lines:
        settings["steps_per_epoch"] = round(lines[-1]["step"] / lines[-1]["epoch"])
    if run.status == "finished":
        settings["total_steps"] = run.read_metadata("summary.json")["steps"]
    names = [folder.name for folder in table_folders(run.lens)]
    kinds = {name: _kind_of(name) for name in names}
    places = {path: place for place, path in enumerate(run.read_metadata("adaptation.json")["adapted"])}
    modules = sorted(open_adapter(adapter).records, key=lambda module: places[module.name])
    write_manifest(run.lens, LensManifest(tuple(modules), "training-lens", kinds, settings))


def _kind_of(table: str) -> DataType:
    return DataType.LOSS if table in (tables.LOSS, tables.EVALUATION) else CollectorRegistry.get(table).data_type


def _look_at_cost(run: RunFolder) -> str:
    return f"{sum(read_cost(run.lens).values()):.1f} s" if run.lens.is_dir() else "no captures"


def _look_at_captures(run: RunFolder) -> str:
    if not run.lens.is_dir():
        return "no captures"
    store = LensStore(run.lens)
    for name in store.tables():
        if list((run.lens / name).glob("*.parquet")):
            store.table(name)
        store.snapshot_steps(name)
    if store.damaged:
        raise CheckpointError(f"damaged or missing, and left out: {', '.join(map(str, store.damaged))}")
    return f"{len(store.tables())} tables"


def _look_at_listing(run: RunFolder) -> str:
    if not (run.lens / LISTING).is_file():
        return "none: no captures, or an earlier version wrote them"
    return f"{len(read_listing(run.lens))} files"


def _list_captures_again(run: RunFolder) -> None:
    write_listing(run.lens, captures_in(run.lens))


def _look_at_cache(run: RunFolder) -> str:
    config, fingerprint = _where_it_is(run, read_run_config(run)), _read_fingerprint(run)
    dataset = open_cached(fingerprint, cache_of(config))
    return f"{len(dataset)} examples" if dataset else "not here: made when it is needed"


def _tokenize_again(run: RunFolder) -> None:
    config, fingerprint = _where_it_is(run, open_run_config(run, {}, *RESUME_KEYS)), _read_fingerprint(run)
    shutil.rmtree(cached_folder(fingerprint, cache_of(config)))
    TrainingWrapper(config).plan()


def _where_it_is(run: RunFolder, config: TrainingConfig) -> TrainingConfig:
    return config.replace_keys(output={"run_id": None, "base_output_dir": str(locate_outputs(run))})


def _read_fingerprint(run: RunFolder) -> str:
    return str(run.read_metadata("data.json")["fingerprint"])


LEFT_OUT = "Nothing brings it back but a copy; all else is read without it."
PARTS = (
    Part("hashes", _look_at_record, _record_anew, "--repair records the files as they are now."),
    Part("metadata", _look_at_metadata, None, KEPT_ELSEWHERE),
    Part("checkpoints", _look_at_checkpoints, _drop_damaged_checkpoints, "--repair deletes the damaged ones."),
    Part("summary", _look_at_summary, _summarize_again, "--repair writes it from the newest checkpoint."),
    Part("base", _look_at_base, _record_base, "Put the base back, or take this one: model.accept_changed_base=true."),
    Part("adapter", _look_at_adapter, _restore_adapter, "--repair takes it from its checkpoint."),
    Part("tokenizer", _look_at_tokenizer, _save_tokenizer_again, "--repair writes it from the base's."),
    Part("journal", _look_at_journal, None, LEFT_OUT),
    Part("lens", _look_at_lens, _index_lens_again, "--repair writes lens.json from the adapter and the tables."),
    Part("lens cost", _look_at_cost, lambda run: (run.lens / COST).unlink(), "--repair deletes it: no file needs it."),
    Part("lens files", _look_at_listing, _list_captures_again, "--repair lists the captures that are there."),
    Part("captures", _look_at_captures, None, LEFT_OUT),
    Part("token cache", _look_at_cache, _tokenize_again, "--repair makes it anew; so does the next run that needs it."),
)
WHOLE_BASE = Part("whole base", _look_at_whole_base, None, "Put the base back that the run trained on.")
