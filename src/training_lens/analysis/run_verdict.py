"""The verdict whether an adapter is better than its base, from its last comparison or its validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.errors import CheckpointError
from training_lens.evaluation.training_verdict import TrainingRecord, assess_training, build_training_record
from training_lens.evaluation.verdict import Verdict
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.integrity import read_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


def find_verdict(recording: Recording) -> Verdict | None:
    """The verdict of `compare` unless the run was trained further; else the verdict of its validation.

    None if the recording has no losses.
    """
    run = RunFolder(recording.folder)
    if (compared := _read_comparison_verdict(run)) is not None:
        return compared
    record = _training_record(recording)
    if record is None:
        return None
    return assess_training(record, str(run.root) if run.metadata.is_dir() else "")


def _read_comparison_verdict(run: RunFolder) -> Verdict | None:
    path = run.reports / "compare.json"
    if not path.is_file():
        return None
    try:
        report: Mapping[str, Any] = read_sealed(path)
        steps = run.read_metadata("summary.json").get("steps", 0)
        if "verdict" not in report or report.get("steps", steps) != steps:
            return None  # written before verdicts existed, or before the run was resumed
        return Verdict.from_json(report["verdict"])
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s has no valid verdict (%s): run training-lens compare again", path, error)
        return None


def _training_record(recording: Recording) -> TrainingRecord | None:
    trained, validated = (recording.series(table, "loss") for table in (tables.LOSS, tables.EVALUATION))
    base = recording.series(tables.EVALUATION, "base_loss").values
    if not trained.steps.size and not validated.steps.size:
        return None
    losses = trained.values.ravel()
    points = [
        (float(step), float(loss))
        for step, loss in zip(validated.steps, validated.values.ravel(), strict=True)
        if np.isfinite(loss) and step > 0
    ]
    known = base[np.isfinite(base)]
    return build_training_record(
        trained.steps.tolist(), losses[np.isfinite(losses)].tolist(), float(known[0]) if known.size else None, points
    )
