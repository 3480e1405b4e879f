"""Repairs parts of a run from the rest of it, for `doctor RUN --repair`."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from training_lens.analysis.saved_adapters import open_adapter
from training_lens.config.run_config import RESUME_KEYS, locate_outputs, open_run_config, read_run_config
from training_lens.config.schema import TrainingConfig
from training_lens.core import table_names as tables
from training_lens.core.capture_files import LENS, LISTING, list_captures, write_listing, write_manifest
from training_lens.core.collector import CollectorRegistry
from training_lens.core.lens_store import COST, read_cost, table_folders
from training_lens.core.types import LensManifest
from training_lens.data.token_cache import cache_folder
from training_lens.errors import CheckpointError, DamagedFileError
from training_lens.models.adapter_files import saved_shapes
from training_lens.models.base_files import save_tokenizer
from training_lens.models.base_record import base_record, require_local_folder
from training_lens.models.checkpoint_files import stored_tensors
from training_lens.models.location import local_folder
from training_lens.runs.checkpoint_format import (
    checkpoint_folder,
    list_checkpoints,
    newest_intact_checkpoint,
    verify_checkpoint,
)
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.checkpoint_manager import ADAPTER, STATE
from training_lens.training.plan import read_tokenizer, token_cache_folder
from training_lens.training.run import TrainingWrapper
from training_lens.training.summary import TrainingSummary, write_summary
from training_lens.utils.files import atomic_folder, hash_file, list_files, read_json
from training_lens.utils.integrity import (
    CHECKSUM,
    RECORDS,
    read_recorded_hashes,
    read_sealed,
    record_hashes,
    write_sealed,
)

SEALED_FILES = ("metadata/summary.json", "metadata/base.json", f"lens/{LENS}", f"lens/{COST}", f"lens/{LISTING}")
UNRECORDED_FILES = ("metadata/process.json", "metadata/tags.json")


def accept_run(run: RunFolder) -> None:
    """Accept all files of a run as they are, and record their hashes again."""
    for name in SEALED_FILES:
        if (path := run.root / name).is_file():
            write_sealed(path, {key: value for key, value in read_json(path).items() if key != CHECKSUM})
    if (run.lens / LISTING).is_file():
        rewrite_capture_listing(run)
    record_hashes_again(run)


def record_hashes_again(run: RunFolder) -> None:
    (run.root / RECORDS[0]).unlink(missing_ok=True)
    files = [*run.metadata.glob("*.json"), *list_files(run.adapter), *list_files(run.tokenizer)]
    skipped = {run.root / name for name in (*SEALED_FILES, *UNRECORDED_FILES)}
    record_hashes(run.root, [path for path in files if path not in skipped])


def record_base(run: RunFolder) -> None:
    """Record the current base as that of the run, if the record is lost."""
    try:
        read_sealed(run.base_record)
    except (DamagedFileError, FileNotFoundError):
        write_sealed(run.base_record, base_record(read_run_config(run).model))


def find_checkpoint_fault(checkpoint: Path) -> str:
    """What is damaged in a checkpoint; empty if it is intact."""
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError as error:
        return str(error)
    return ""


def drop_damaged_checkpoints(run: RunFolder) -> None:
    _drop_damaged(run.checkpoints)


def drop_damaged_states(run: RunFolder) -> None:
    _drop_damaged(run.states)


def _drop_damaged(checkpoints: Path) -> None:
    for folder in filter(find_checkpoint_fault, list_checkpoints(checkpoints)):
        shutil.rmtree(folder)


def rewrite_summary(run: RunFolder) -> None:
    """Rebuild the summary from the newest checkpoint and metrics.jsonl; the peak memory is unknown, and 0."""
    found = newest_intact_checkpoint(run.checkpoints)
    if found is None:
        raise CheckpointError("no checkpoint is intact, and nothing else tells how far the run came.")
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


def restore_run_adapter(run: RunFolder) -> None:
    step = int(run.read_metadata("summary.json")["adapter_step"])
    source = checkpoint_folder(run.checkpoints, step) / ADAPTER
    verify_checkpoint(source.parent)
    with atomic_folder(run.adapter, existing="replace") as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        _require_recorded(folder, run, "artifacts/adapter")


def _require_recorded(folder: Path, run: RunFolder, name: str) -> None:
    """Require that the restored files equal the lost ones, byte for byte."""
    for recorded, sha256 in read_recorded_hashes(run.root).items():
        path = folder / recorded.removeprefix(f"{name}/")
        if recorded.startswith(f"{name}/") and not (path.is_file() and hash_file(path) == sha256):
            raise CheckpointError(f"the restored {recorded} differs from the lost one.")


def rewrite_tokenizer(run: RunFolder) -> None:
    config = open_run_config(run, {}, "model.trust_remote_code")
    with atomic_folder(run.tokenizer, existing="replace") as folder:
        _, tokenizer = read_tokenizer(config)
        save_tokenizer(tokenizer, folder, require_local_folder(config.model), config.model.trust_remote_code)
        _require_recorded(folder, run, "artifacts/tokenizer")


def rewrite_lens_manifest(run: RunFolder) -> None:
    """Rebuild lens.json from the newest adapter, the existing tables and the run's config, without the probe set."""
    folders = [folder / ADAPTER for folder in reversed(list_checkpoints(run.checkpoints))]
    adapter = next((folder for folder in folders if folder.is_dir()), run.adapter)
    config, lines = read_run_config(run), [line for line in read_metrics(run.metrics_file) if line.get("epoch")]
    settings: dict[str, Any] = {"max_grad_norm": config.training.max_grad_norm, "lr": config.training.lr}
    if lines:
        settings["steps_per_epoch"] = round(lines[-1]["step"] / lines[-1]["epoch"])
    if run.status == "finished":
        settings["total_steps"] = run.read_metadata("summary.json")["steps"]
    names = [folder.name for folder in table_folders(run.lens)]
    kinds = {n: tables.LOOP_TABLES.get(n) or CollectorRegistry.get(n).data_type for n in names}
    places = {path: place for place, path in enumerate(run.read_metadata("adaptation.json")["adapted"])}
    modules = sorted(open_adapter(adapter).records, key=lambda module: places[module.name.partition("[")[0]])
    write_manifest(run.lens, LensManifest(tuple(modules), "training-lens", kinds, settings))


def rewrite_capture_listing(run: RunFolder) -> None:
    write_listing(run.lens, list_captures(run.lens))


def rebuild_token_cache(run: RunFolder) -> None:
    config, fingerprint = relocate_config(run, open_run_config(run, {}, *RESUME_KEYS)), read_fingerprint(run)
    shutil.rmtree(cache_folder(fingerprint, token_cache_folder(config)))
    TrainingWrapper(config).plan()


def relocate_config(run: RunFolder, config: TrainingConfig) -> TrainingConfig:
    return config.replace_keys(output={"run_id": None, "base_output_dir": str(locate_outputs(run))})


def read_fingerprint(run: RunFolder) -> str:
    return str(run.read_metadata("data.json")["fingerprint"])
