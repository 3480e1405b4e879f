"""The explanations of one finished run, in Python: `Run(...).explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training_lens.analysis.run_rows import RowOptions
from training_lens.config.evaluation_sections import EvaluationSection, InferenceSection
from training_lens.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from training_lens.analysis.explanations.answer_changes import AnswerChange
    from training_lens.analysis.explanations.answer_question import AnswerQuestion
    from training_lens.analysis.explanations.memory_measurement import MemoryExplanation, MemoryOptions
    from training_lens.analysis.explanations.module_gains import ModuleGains
    from training_lens.analysis.explanations.row_explanation import RowsExplanation, RowsOptions

OWN_ROWS = RowOptions()


class Explainer:
    """Explains a finished run's adapter: each method measures, and returns what it found.

    Example:
        rows = Run.latest().explain.rows()
        print([row.id for row in rows.suspects])
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def modules(self, rows: RowOptions = OWN_ROWS, settings: EvaluationSection | None = None) -> ModuleGains:
        """Where the gain lives, by module, layer, type, domain and length, see `measure_modules`.

        Args:
            rows: on which the loss is measured; the run's validation rows without it.
            settings: of intervals and buckets, as in the config's `evaluation`.

        Raises:
            CheckpointError, AdapterError: the run has no finished adapter, or it cannot be loaded or multiplied.
            ConfigurationError, DatasetError: there are no rows to measure on.
        """
        from training_lens.analysis.explanations.explained_adapter import ExplainedAdapter
        from training_lens.analysis.explanations.module_measurement import measure_modules

        session, found = ExplainedAdapter.from_run(self.run, rows).open_rows()
        return measure_modules(session, found, settings or EvaluationSection())

    def rows(self, options: RowsOptions | None = None) -> RowsExplanation:
        """The life of each training row, from the losses that the run recorded, see `explain_rows`.

        Raises:
            CheckpointError: the run recorded no losses of rows, or its rows changed since.
        """
        from training_lens.analysis.explanations.row_explanation import explain_rows

        return explain_rows(self.run, options)

    def memory(self, options: MemoryOptions | None = None) -> MemoryExplanation:
        """What the adapter remembers of its rows: exposure and exact continuations, see `explain_memory`.

        Raises:
            CheckpointError, AdapterError: the run has no finished adapter, or its rows changed since.
            ConfigurationError: options out of range, or no such row.
        """
        from training_lens.analysis.explanations.memory_measurement import explain_memory

        self.run.require_adapter()
        return explain_memory(self.run, options)

    def answer(self, question: AnswerQuestion | str, **settings: Any) -> AnswerChange:
        """Why an answer changed, by token, layer and module, see `explain_answer`.

        Args:
            question: a prompt, or an `AnswerQuestion` with a given answer, token or domain, or a row of the run's data.
            settings: keys of `inference.`, such as `max_new_tokens=64`.

        Raises:
            CheckpointError, AdapterError: the run has no finished adapter, or it cannot be loaded or multiplied.
            ConfigurationError: there is no such row, token or domain, or the prompt leaves no room to answer.
        """
        from training_lens.analysis.explanations.answer_measurement import explain_answer
        from training_lens.analysis.explanations.answer_question import AnswerQuestion
        from training_lens.inference.session import open_run

        self.run.require_adapter()
        asked = AnswerQuestion(question) if isinstance(question, str) else question
        asked.check()
        session = open_run(self.run)
        return explain_answer(self.run, session, asked, InferenceSection(**settings))
