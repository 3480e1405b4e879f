"""The adapter that is explained, with the rows that its loss is measured on: a run's, or a folder on a given base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training_lens.analysis.run_rows import RowOptions, open_rows
from training_lens.config.schema import TrainingConfig
from training_lens.evaluation.evaluation_rows import EvaluationRows
from training_lens.inference.heldout_examples import configured_examples
from training_lens.inference.session import Session, open_session
from training_lens.models.adapter_files import require_adapter
from training_lens.runs.run_folder import RunFolder, new_run_id, runs_folder
from training_lens.utils.names import expand_home

Opened = tuple[Session, EvaluationRows]


@dataclass(frozen=True)
class ExplainedAdapter:
    """`folder` holds the adapter as trained, `reports` takes what is written; `open_with` loads any adapter instead."""

    source: str
    folder: Path
    reports: Path
    open_with: Callable[[Path], Opened]

    @classmethod
    def from_run(cls, run: RunFolder, options: RowOptions) -> ExplainedAdapter:
        """A run's, on its validation rows or those of `options`.

        Raises:
            CheckpointError: the run has no finished adapter.
        """
        run.require_adapter()
        return cls(str(run.root), run.adapter, run.reports, lambda folder: open_rows(run, options, adapter=folder))

    @classmethod
    def from_folder(cls, config: TrainingConfig) -> ExplainedAdapter:
        """The adapter folder that `inference.adapter` names, on `model.id` and the config's validation rows.

        Reports go to a new folder under the experiment's `explanations`.

        Raises:
            AdapterError: the folder lacks files.
        """
        folder = require_adapter(expand_home(config.inference.adapter))
        runs = runs_folder(config.output.base_output_dir, config.output.experiment_name)

        def open_with(adapter: Path) -> Opened:
            session = open_session(config.replace_keys(inference={"adapter": str(adapter)}))
            examples = configured_examples(session, config.evaluation.max_examples)
            return session, EvaluationRows.from_examples(examples, session)

        return cls(str(folder), folder, runs.with_name("explanations") / new_run_id(), open_with)

    def open_rows(self) -> Opened:
        """The model with the adapter, and the rows.

        Raises:
            CheckpointError, AdapterError, ModelLoadingError: the adapter or its base cannot be loaded.
            ConfigurationError, DatasetError: there are no rows to measure on.
        """
        return self.open_with(self.folder)
