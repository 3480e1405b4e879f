"""Opening a run for analysis, whatever it is: captures of the lens, or the checkpoints that a trainer left."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_lens.analysis.checkpoint_captures import CheckpointCaptures
from training_lens.analysis.logs import TRAINER_STATE, Log, our_log, trainer_log, trainer_step
from training_lens.analysis.saved_adapters import SavedAdapter, base_weights, holds_adapter, open_adapter
from training_lens.core import table_names as tables
from training_lens.core.lens_manifest import LENS
from training_lens.core.lens_store import LensStore
from training_lens.core.recording import Recording
from training_lens.core.types import DataType, LensManifest
from training_lens.errors import AdapterError, CheckpointError, LensError
from training_lens.runs.checkpoint_format import list_checkpoints
from training_lens.runs.run_folder import RunFolder, list_run_folders
from training_lens.utils.formatting import nearest_name
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home

logger = get_logger(__name__)
OURS, TRAINERS = re.compile(r"step-(\d+)"), re.compile(r"checkpoint-(\d+)")
FULL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
LOOKED_FOR = (
    "a run folder (metadata/), captures (lens.json), checkpoints of the HF Trainer (checkpoint-*/) or of ours "
    "(step-*/), or one adapter (adapter_config.json and adapter_model.safetensors)"
)
KINDS = {
    **dict.fromkeys((tables.WEIGHTS, tables.SPECTRA, tables.BASE, tables.SNAPSHOTS), DataType.ADAPTER_WEIGHTS),
    **dict.fromkeys((tables.LOSS, tables.EVALUATION), DataType.LOSS),
}


@dataclass(frozen=True)
class Source:
    """Adapters of one run by step, not opened yet, and what its log says. `origin` is that of `LensManifest`."""

    folders: Mapping[int, Path]
    log: Log
    origin: str


def open_recording(path: Path | str, base: Path | str | None = None) -> Recording:
    """What is known of a run, finished, running or broken off.

    Args:
        path: a run folder, a lens folder, the output folder of the HF Trainer, a folder of our checkpoints, or one
            PEFT adapter. A run folder without captures is read from its checkpoints, which is logged.
        base: for adapters, the folder of the model under them; None: where their configuration says it is.

    Raises:
        LensError: there is nothing to read, or checkpoints are of different shapes; says what was found.
        AdapterError: an adapter is broken, no LoRA or DoRA, or not saved as safetensors.
        ModelLoadingError: `base` cannot be read.

    Example:
        recording = open_recording("outputs/experiments/default/runs/20261120T203605Z-5f3a")
        recording.series("adapter_weights", "norm_update").of("model.layers.0.self_attn.q_proj")
    """
    folder = _existing(expand_home(path))
    for holds, read in _FORMS:
        if holds(folder):
            return read(folder, base)
    raise LensError(_nothing_in(folder))


def _existing(path: Path) -> Path:
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise LensError(f"'{path}' is a file. Give the folder that it is in: {LOOKED_FOR}.")
    close = nearest_name(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
    hint = f"Did you mean '{path.parent / close}'?" if close else f"Relative paths start at {Path.cwd()}."
    raise LensError(f"no folder '{path}'. {hint}")


def _is_lens(folder: Path) -> bool:
    return (folder / LENS).is_file()


def _has_lens(folder: Path) -> bool:
    return _is_lens(folder / "lens")


def _is_run(folder: Path) -> bool:
    return RunFolder(folder).metadata.is_dir()


def _is_our_checkpoint(folder: Path) -> bool:
    return holds_adapter(folder / "adapter")


def _captured(folder: Path, _base: Path | str | None) -> Recording:
    """Captures; those of a run of ours, or of another trainer's output, belong to the folder around them."""
    store, run = LensStore(folder), RunFolder(folder.parent)
    if folder.name != "lens":
        return Recording(folder.name, folder, store.manifest, store)
    status = _status(run) if _is_run(run.root) else "unknown"
    return Recording(run.run_id, run.root, store.manifest, store, status)


def _status(run: RunFolder) -> str:
    try:
        return run.status
    except CheckpointError as error:
        logger.warning("whether the run is finished is not known: %s", error)
        return "unknown"


def _of_run(folder: Path, base: Path | str | None) -> Recording:
    """A run of ours without captures: its checkpoints and its adapter, and the losses of its metrics.jsonl."""
    run = RunFolder(folder)
    source = _run_source(run)
    status = _status(run)
    if not source.folders:
        raise LensError(
            f"the run {run.run_id} ({status}) has nothing to analyse: no captures in {folder / 'lens'}, no checkpoints "
            f"in {run.checkpoints}, and no adapter. Train it with lens.enabled=true, or wait for its first checkpoint."
        )
    logger.info(
        "%s has no captures (lens.enabled=false?): it is read from %d saved adapters and its log. Gradients, "
        "activations and what happened between these steps are therefore missing.",
        *(run.run_id, len(source.folders)),
    )
    return _from_adapters(folder, source, base, status)


def _run_source(run: RunFolder) -> Source:
    config, summary = _metadata(run, "config.json"), _metadata(run, "summary.json")
    training = config.get("training") or {}
    settings = {"max_grad_norm": training.get("max_grad_norm"), "lr": training.get("lr")}
    if summary.get("status") == "finished":
        settings["total_steps"] = summary.get("steps")
        if summary.get("epochs"):
            settings["steps_per_epoch"] = max(1, round(summary["steps"] / summary["epochs"]))
    folders = _our_checkpoints(run.checkpoints)
    if holds_adapter(run.adapter):
        folders.setdefault(int(summary.get("adapter_step") or max(folders, default=0)), run.adapter)
    return Source(folders, our_log(run.metrics_file, settings), "training-lens")


def _metadata(run: RunFolder, name: str) -> Mapping[str, Any]:
    try:
        values = run.read_metadata(name)
    except CheckpointError as error:
        logger.warning("%s The run is read without what it says.", error)
        return {}
    return values if isinstance(values, dict) else {}


def _our_checkpoints(folder: Path) -> dict[int, Path]:
    found = [(OURS.fullmatch(path.name), path / "adapter") for path in list_checkpoints(folder)]
    return {int(match[1]): path for match, path in found if match and holds_adapter(path)}


def _trainer_checkpoints(folder: Path) -> dict[int, Path]:
    found = [(TRAINERS.fullmatch(path.name), path) for path in folder.glob("checkpoint-*/")]
    return {int(match[1]): path for match, path in found if match and holds_adapter(path)}


def _of_our_checkpoints(folder: Path, base: Path | str | None) -> Recording:
    return _from_adapters(folder, Source(_our_checkpoints(folder), Log(), "training-lens"), base)


def _of_our_checkpoint(folder: Path, base: Path | str | None) -> Recording:
    match = OURS.fullmatch(folder.name)
    step = int(match[1]) if match else 0
    return _from_adapters(folder, Source({step: folder / "adapter"}, Log(), "training-lens"), base)


def _of_trainer(folder: Path, base: Path | str | None) -> Recording:
    """The HF Trainer's output; its newest state has the log of all steps."""
    folders = _trainer_checkpoints(folder)
    states = [folder / TRAINER_STATE, *(folders[step] / TRAINER_STATE for step in sorted(folders, reverse=True))]
    state = next((path for path in states if path.is_file()), None)
    log = trainer_log(state) if state else Log()
    if state is None:
        logger.info("%s has no %s: losses are unknown", folder, TRAINER_STATE)
    return _from_adapters(folder, Source(folders, log, "transformers"), base, log.status)


def _of_adapter(folder: Path, base: Path | str | None) -> Recording:
    """One adapter; beside it may be the state of the HF Trainer that saved it."""
    state = folder / TRAINER_STATE
    step, log = (trainer_step(state), trainer_log(state)) if state.is_file() else (0, Log())
    return _from_adapters(folder, Source({step: folder}, log, "transformers" if step else "hand"), base)


def _from_adapters(folder: Path, source: Source, base: Path | str | None, status: str = "unknown") -> Recording:
    adapters = _opened(source.folders)
    captures = CheckpointCaptures(adapters, source.log.tables, base_weights(adapters[-1], base))
    manifest = LensManifest(
        adapters[0].records, source.origin, {name: KINDS[name] for name in captures.tables()}, source.log.settings
    )
    return Recording(folder.name, folder, manifest, captures, status)


def _opened(folders: Mapping[int, Path]) -> Sequence[SavedAdapter]:
    """Those that are whole, by step: a kill may have cut the last one short.

    Raises:
        AdapterError: none is.
    """
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
        logger.warning("passing over a checkpoint: %s", error)
    return adapters


def _nothing_in(folder: Path) -> str:
    there = sorted(p.name for p in folder.iterdir())
    if not there:
        return f"{folder} is empty. Give {LOOKED_FOR}."
    if found := _full_weights(folder):
        return (
            f"{found[0]} is a whole model, and beside it is no adapter: a full fine-tune, or a merged model. The lens "
            "reads LoRA and DoRA adapters; give the folder that PEFT's save_pretrained wrote."
        )
    runs = list_run_folders(folder) or list_run_folders(folder / "runs")
    if runs:
        return f"{folder} holds {len(runs)} runs and is none itself. Give one of them, such as {runs[-1].root}."
    shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    return f"{folder} is no run. Looked for {LOOKED_FOR}; found {shown}."


def _full_weights(folder: Path) -> list[Path]:
    return [
        path for name in FULL_WEIGHTS for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.is_file()
    ]


# What a folder may be, and how it is read then; the first that fits.
_FORMS: tuple[tuple[Callable[[Path], object], Callable[[Path, Path | str | None], Recording]], ...] = (
    (_is_lens, _captured),
    (_has_lens, lambda folder, base: _captured(folder / "lens", base)),
    (_is_run, _of_run),
    (holds_adapter, _of_adapter),
    (_trainer_checkpoints, _of_trainer),
    (_is_our_checkpoint, _of_our_checkpoint),
    (_our_checkpoints, _of_our_checkpoints),
)
