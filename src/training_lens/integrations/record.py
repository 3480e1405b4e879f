"""A run as integrations see it: its folder and its config, read-only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_lens.config.run_config import locate_outputs, read_run_config
from training_lens.models.adapter_files import WEIGHTS, require_finite
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.integrity import require_intact
from training_lens.utils.nested import flatten_sections
from training_lens.utils.secrets import redact_text

if TYPE_CHECKING:
    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer


class RunRecord:
    """The current state of a run, read from its folder.

    Args:
        folder: of the run.
        changes: config keys by section that replace the run's own, for a run that is sent later:
            `{"tracking": {"wandb": {"mode": "online"}}}`.

    Raises:
        CheckpointError: the folder is no run, or a link in it leads out of it.
    """

    def __init__(self, folder: RunFolder, changes: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.folder = folder
        self.config = read_run_config(folder, changes)

    @property
    def run_id(self) -> str:
        return self.folder.run_id

    @property
    def experiment(self) -> str:
        return self.config.output.experiment_name

    @property
    def base_output_dir(self) -> Path:
        """The output folder that the run is in now, wherever it was trained."""
        return locate_outputs(self.folder).resolve()

    @property
    def identity(self) -> str:
        """16 hex digits of name and settings, which distinguish runs of the same name but other settings."""
        settings = {name: section for name, section in self.settings.items() if name not in ("output", "tracking")}
        return hash_values([self.experiment, self.run_id, settings])

    @property
    def status(self) -> str:
        """running, finished, failed, pruned or interrupted."""
        return self.folder.status

    @property
    def summary(self) -> dict[str, Any]:
        """metadata/summary.json."""
        return dict(self.folder.read_metadata("summary.json"))

    @property
    def totals(self) -> dict[str, float]:
        """The numbers of the summary as metrics, under a name that sorts them after the training curves."""
        return {f"whole_run/{k}": v for k, v in self.summary.items() if isinstance(v, int | float)}

    @property
    def settings(self) -> dict[str, Any]:
        """The run's resolved config, nested, as it is saved, without secrets."""
        values: dict[str, Any] = self.config.model_dump(mode="json")
        return values

    @property
    def sweep(self) -> str | None:
        """The sweep that this run is a trial of, or None."""
        return self.experiment if self.run_id.startswith("trial-") else None

    @property
    def intact_adapter(self) -> Path | None:
        """The adapter that answers, if it is intact and finite, or it must not be sent; None if there is none yet."""
        folder = self.folder.served_adapter
        if not (folder / WEIGHTS).is_file():
            return None
        require_intact(folder)
        require_finite(folder)
        return folder

    def tracking_folder(self, integration: str) -> Path:
        """The folder that an integration may write to: tracking/NAME."""
        return self.folder.tracking / integration

    @cached_property
    def analysis(self) -> CheckpointAnalyzer | None:
        """The analysis of the lens, opened once for all integrations; None without captures. Takes seconds."""
        from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
        from training_lens.errors import TrainingLensError

        try:
            return CheckpointAnalyzer(self.folder.root)
        except TrainingLensError:
            return None


def hash_values(values: Any) -> str:
    """16 hex digits of a JSON value, to recognize it by."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def flatten_settings(run: RunRecord) -> dict[str, str | int | float | bool]:
    """The run's settings by `section.key`, for services that take a flat list; lists and null as text."""
    leaves = {key: "null" if value is None else value for key, value in flatten_sections(run.settings).items()}
    return {key: value if isinstance(value, int | float) else redact_text(str(value)) for key, value in leaves.items()}
