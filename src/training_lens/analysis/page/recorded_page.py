"""The page of a recording without a run folder of ours: captures of another trainer, or its checkpoints."""

from __future__ import annotations

import shlex
from typing import Any

from training_lens.analysis.page.run_feed import average_neighbors
from training_lens.analysis.run_facts import find_verdict, read_losses
from training_lens.analyzers.module_groups import finite_points, json_numbers
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.display.downsampling import thin_line
from training_lens.evaluation.training_verdict import TrainingRecord, assess_training

EVALUATIONS = (("base_loss", "base"), ("sample_loss", "validation_sample"), ("loss", "validation"))


def describe_recording(recording: Recording, points: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of its page, and its curves of at most so many points."""
    curves = _read_curves(recording, points)
    losses = read_losses(recording)
    verdict = find_verdict(recording) or assess_training(TrainingRecord(0))
    row: dict[str, Any] = {
        "experiment": recording.manifest.origin,
        "run": recording.name,
        "status": recording.status,
        "started": None,
        "seconds": None,
        "detail": "",
        "tags": [],
        "loss": losses.best,
        "base_loss": losses.base,
    }
    page = {
        "row": row,
        "headline": {"phrase": losses.as_sentence(recording.manifest.origin).rstrip("."), "verdict": verdict.as_json()},
        "progress": {"step": curves["last_step"], "total_steps": recording.settings.get("total_steps")},
        "active_findings": [],
        "samples": [],
        "evaluation": None,
        "settings": [{"key": key, "value": value, "is_changed": True} for key, value in recording.settings.items()],
        "data": [],
        "environment": {},
        "events": {"epochs": [], "checkpoints": recording.captures.snapshot_steps(tables.SNAPSHOTS), "findings": []},
        "explanations": [],
        "files": [],
        "folder": str(recording.folder),
        "name": shlex.quote(str(recording.folder)),
        "next_steps": [],
    }
    return page, curves


def _read_curves(recording: Recording, points: int) -> dict[str, Any]:
    curves = {}
    for name in ("loss", "grad_norm", "lr"):
        series = recording.series(tables.LOSS, name)
        if len(series.steps):
            steps, values = thin_line(series.steps, series.values[:, 0], points)
            curves[name] = [steps.tolist(), json_numbers(values)]
    loss = recording.series(tables.LOSS, "loss")
    if len(mean := average_neighbors(loss.values[:, 0] if len(loss.steps) else loss.values)):
        steps, values = thin_line(loss.steps, mean, points)
        curves["loss_mean"] = [steps.tolist(), json_numbers(values)]
    validations = [
        {"kind": kind, "step": int(step), "loss": float(value)}
        for measure, kind in EVALUATIONS
        for step, value in zip(*finite_points(recording, tables.EVALUATION, measure), strict=True)
    ]
    last = int(loss.steps[-1]) if len(loss.steps) else 0
    return {"last_step": last, "curves": curves, "validations": validations}
