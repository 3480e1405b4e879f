"""Opens any run for analysis: lens captures, or the checkpoints of a trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_lens.analysis.checkpoint_captures import CheckpointCaptures
from training_lens.analysis.logs import TRAINER_STATE, Log, read_our_log, read_trainer_log
from training_lens.analysis.saved_adapters import (
    SavedAdapter,
    has_adapter_files,
    open_adapter,
    open_base_weights,
)
from training_lens.core import table_names as tables
from training_lens.core.capture_files import LENS
from training_lens.core.lens_store import LensStore
from training_lens.core.recording import Recording
from training_lens.core.types import DataType, LensManifest
from training_lens.errors import AdapterError, CheckpointError, LensError
from training_lens.runs.run_folder import RunFolder, list_run_folders
from training_lens.utils.formatting import pluralize, suggest_path
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home

logger = get_logger(__name__)
OURS, TRAINERS = re.compile(r"step-(\d+)"), re.compile(r"checkpoint-(\d+)")
FULL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
EXPECTED_FOLDERS = (
    "a run folder (metadata/), captures (lens.json), checkpoints of the HF Trainer (checkpoint-*/) or of ours "
    "(step-*/), or one adapter (adapter_config.json and adapter_model.safetensors)"
)
KINDS = {
    **dict.fromkeys((tables.WEIGHTS, tables.SPECTRA, tables.BASE, tables.SNAPSHOTS), DataType.ADAPTER_WEIGHTS),
    **dict.fromkeys((tables.LOSS, tables.EVALUATION), DataType.LOSS),
}


@dataclass(frozen=True)
class AdapterSource:
    """The adapter folders of one run by step, and its log. `origin` is that of `LensManifest`."""

    folders: Mapping[int, Path]
    log: Log
    origin: str


def open_recording(path: Path | str, base: Path | str | None = None) -> Recording:
    """The recording of a finished, running or interrupted run.

    Args:
        path: a run folder, a lens folder, the output folder of the HF Trainer, a folder of our checkpoints, or one
            PEFT adapter. A run folder without captures is read from its checkpoints, with a log message.
        base: for adapters, the base model folder; None: the one in their configuration.

    Raises:
        LensError: there is nothing to read, or checkpoints have different shapes; says what was found.
        AdapterError: an adapter is broken, not a LoRA or DoRA, or not saved as safetensors.
        ModelLoadingError: `base` cannot be read.

    Example:
        recording = open_recording("outputs/experiments/default/runs/20261120T203605Z-5f3a")
        recording.series("adapter_weights", "norm_update").column("model.layers.0.self_attn.q_proj")
    """
    folder = _require_folder(expand_home(path))
    for captures in (folder, folder / "lens"):
        if (captures / LENS).is_file():
            return _open_captures(captures)
    if RunFolder(folder).metadata.is_dir():
        return _open_run_adapters(folder, base)
    source = _find_adapters(folder)
    if source is None:
        raise LensError(_explain_unreadable(folder))
    return _build_recording(folder, source, base, source.log.status)


def _require_folder(path: Path) -> Path:
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise LensError(f"'{path}' is a file. Give its folder: {EXPECTED_FOLDERS}.")
    raise LensError(f"no folder '{path}'.{suggest_path(path)}")


def _open_captures(folder: Path) -> Recording:
    """A recording of captures; a folder named `lens` belongs to the run around it."""
    store, run = LensStore(folder), RunFolder(folder.parent)
    if folder.name != "lens":
        return Recording(folder.name, folder, store.manifest, store)
    status = _read_status(run) if run.metadata.is_dir() else "unknown"
    return Recording(run.run_id, run.root, store.manifest, store, status)


def _read_status(run: RunFolder) -> str:
    try:
        return run.status
    except CheckpointError as error:
        logger.warning("the status of the run is unknown: %s", error)
        return "unknown"


def _open_run_adapters(folder: Path, base: Path | str | None) -> Recording:
    """One of our runs without captures: its checkpoints, its adapter, and the losses of its metrics.jsonl."""
    run = RunFolder(folder)
    status = _read_status(run)
    if not has_adapter_files(run.adapter) and not _find_checkpoints(run.checkpoints, OURS, "adapter"):
        raise LensError(
            f"the run {run.run_id} ({status}) has nothing to analyse: no captures in {folder / 'lens'}, no checkpoints "
            f"in {run.checkpoints}, and no adapter. Train it with lens.enabled=true, or wait for its first checkpoint."
        )
    source = _find_run_adapters(run)
    logger.info(
        "%s has no captures (lens.enabled=false?): it is read from %d saved adapters and its log, without gradients, "
        "activations and the steps in between.",
        *(run.run_id, len(source.folders)),
    )
    return _build_recording(folder, source, base, status)


def _find_run_adapters(run: RunFolder) -> AdapterSource:
    config, summary = _read_metadata(run, "config.json"), _read_metadata(run, "summary.json")
    training = config.get("training") or {}
    settings = {"max_grad_norm": training.get("max_grad_norm"), "lr": training.get("lr")}
    if summary.get("status") == "finished":
        settings["total_steps"] = summary.get("steps")
        if summary.get("epochs"):
            settings["steps_per_epoch"] = max(1, round(summary["steps"] / summary["epochs"]))
    folders = _find_checkpoints(run.checkpoints, OURS, "adapter")
    if has_adapter_files(run.adapter):
        folders.setdefault(int(summary.get("adapter_step") or max(folders, default=0)), run.adapter)
    return AdapterSource(folders, read_our_log(run.metrics_file, settings), "training-lens")


def _read_metadata(run: RunFolder, name: str) -> Mapping[str, Any]:
    try:
        values = run.read_metadata(name)
    except CheckpointError as error:
        logger.warning("%s The run is read without it.", error)
        return {}
    return values if isinstance(values, dict) else {}


def _find_adapters(folder: Path) -> AdapterSource | None:
    """The adapters in a folder that is no run of ours, with the log of their trainer; None if there are none."""
    state = folder / TRAINER_STATE
    if has_adapter_files(folder):  # one adapter, perhaps with the state of the HF Trainer beside it
        log = read_trainer_log(state) if state.is_file() else Log()
        return AdapterSource({log.step: folder}, log, "transformers" if log.step else "hand")
    if folders := _find_checkpoints(folder, TRAINERS):
        # the newest state has the log of all steps
        states = [state, *(folders[step] / TRAINER_STATE for step in sorted(folders, reverse=True))]
        newest = next((path for path in states if path.is_file()), None)
        if newest is None:
            logger.info("%s has no %s: losses are unknown", folder, TRAINER_STATE)
        return AdapterSource(folders, read_trainer_log(newest) if newest else Log(), "transformers")
    folders = _find_checkpoints(folder, OURS, "adapter")
    if has_adapter_files(folder / "adapter"):
        match = OURS.fullmatch(folder.name)
        folders = {int(match[1]) if match else 0: folder / "adapter"}
    return AdapterSource(folders, Log(), "training-lens") if folders else None


def _find_checkpoints(folder: Path, pattern: re.Pattern[str], inner: str = "") -> dict[int, Path]:
    """By step, the folders with adapter files whose names match; the files of ours are in the folder `inner`."""
    matches = [(pattern.fullmatch(path.name), path / inner) for path in folder.glob("*/")]
    return {int(match[1]): path for match, path in matches if match and has_adapter_files(path)}


def _build_recording(folder: Path, source: AdapterSource, base: Path | str | None, status: str) -> Recording:
    adapters = _open_intact_adapters(source.folders)
    captures = CheckpointCaptures(adapters, source.log.tables, open_base_weights(adapters[-1], base))
    manifest = LensManifest(
        adapters[0].records, source.origin, {name: KINDS[name] for name in captures.tables()}, source.log.settings
    )
    return Recording(folder.name, folder, manifest, captures, status)


def _open_intact_adapters(folders: Mapping[int, Path]) -> Sequence[SavedAdapter]:
    """The intact adapters by step, at least one: the last one may be incomplete after a kill."""
    adapters: list[SavedAdapter] = []
    failed: list[AdapterError] = []
    for step, folder in sorted(folders.items()):
        try:
            adapters.append(open_adapter(folder, step))
        except AdapterError as broken:
            failed.append(broken)
    if not adapters:
        raise failed[0]
    for error in failed:
        logger.warning("skipping a checkpoint: %s", error)
    return adapters


def _explain_unreadable(folder: Path) -> str:
    there = sorted(p.name for p in folder.iterdir())
    if not there:
        return f"{folder} is empty. Give {EXPECTED_FOLDERS}."
    patterns = (*FULL_WEIGHTS, *(f"*/{name}" for name in FULL_WEIGHTS))
    if found := next((path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()), None):
        return (
            f"{found} is a full model without an adapter: a full fine-tune or a merged model. The lens reads LoRA "
            "and DoRA adapters; give the folder that PEFT's save_pretrained wrote."
        )
    runs = list_run_folders(folder) or list_run_folders(folder / "runs")
    if runs:
        return f"{folder} contains {pluralize(len(runs), 'run')}. Give one of them, such as {runs[-1].root}."
    shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    return f"{folder} is not a run. Expected {EXPECTED_FOLDERS}; found {shown}."
