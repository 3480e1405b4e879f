"""The verdict on a run from its files: of its comparison with the base if there is one, else of its own validation."""

from __future__ import annotations

from training_lens.errors import CheckpointError
from training_lens.evaluation.training_verdict import assess_training, read_training_record
from training_lens.evaluation.verdict import Verdict
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.integrity import read_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


def read_run_verdict(run: RunFolder) -> Verdict:
    """The verdict of `compare` unless the run was trained further since, else of its validation."""
    return read_comparison_verdict(run) or assess_training(read_training_record(run), str(run.root))


def read_comparison_verdict(run: RunFolder) -> Verdict | None:
    """The verdict of the run's `compare`; None without one, or where the run was trained further since."""
    path = run.reports / "compare.json"
    if not path.is_file():
        return None
    try:
        report = read_sealed(path)
        steps = run.read_metadata("summary.json").get("steps", 0)
        if "verdict" not in report or report.get("steps", steps) != steps:
            return None  # written before verdicts existed, or before the run was resumed
        return Verdict.from_json(report["verdict"])
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s has no valid verdict (%s): run training-lens compare again", path, error)
        return None
