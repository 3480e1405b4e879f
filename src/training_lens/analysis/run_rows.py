"""A finished run's model and the rows that something is measured on after the training: its rank, its scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_lens.config.schema import TrainingConfig
from training_lens.evaluation.evaluation_rows import EvaluationRows
from training_lens.inference.heldout_examples import validation_examples
from training_lens.inference.session import Session, open_run
from training_lens.runs.run_folder import RunFolder


@dataclass(frozen=True)
class RowOptions:
    """Which rows are measured, and how the model is loaded.

    `max_examples`: the first rows that fit, None: all; `data`: sources instead of the run's validation rows; `device`:
    as `model.device`, None: the run's; `given`: see `open_run`.
    """

    max_examples: int | None = None
    data: Sequence[str] | None = None
    device: str | None = None
    given: Mapping[str, Any] | None = None

    @classmethod
    def from_settings(cls, settings: TrainingConfig) -> RowOptions:
        """Those that a command's settings name."""
        data = [str(source) for source in settings.data.validation] if settings.data.validation else None
        device, given = settings.model.chosen_device, settings.explicit_values()
        return cls(settings.evaluation.max_examples, data, device, given)


def open_rows(run: RunFolder, options: RowOptions, adapter: Path | None = None) -> tuple[Session, EvaluationRows]:
    """The run's base with the adapter in a folder (None: the run's as trained), and the rows.

    Raises:
        CheckpointError, AdapterError: the run is not finished, or cannot be loaded.
        ConfigurationError, DatasetError: there are no rows to measure on.
    """
    session = open_run(run, options.device, given=options.given, adapter=adapter or run.adapter)
    examples = validation_examples(run, session, options.max_examples, options.data)
    return session, EvaluationRows.from_examples(examples, session)
