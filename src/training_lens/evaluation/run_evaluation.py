"""Models evaluated on rows: a run's adapter against its base or another run, or one model alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from training_lens.config.data_sections import DataSection
from training_lens.config.evaluation_sections import EvaluationSection, InferenceSection
from training_lens.data.examples import Example
from training_lens.data.source_reader import read_examples
from training_lens.display.progress import Progress
from training_lens.errors import EvaluationError
from training_lens.evaluation.answer_endings import SPARE_TOKENS, Endings, summarize_endings
from training_lens.evaluation.comparison import (
    ADAPTER,
    BASE,
    ControlResult,
    LengthBuckets,
    ModelComparison,
    compare_control,
    compare_models,
    corrupt_prompts,
    measure_forgetting,
)
from training_lens.evaluation.comparison_verdict import assess_comparison
from training_lens.evaluation.evaluation_rows import EvaluationRows, TrainedRows, find_trained_rows
from training_lens.evaluation.evaluator import BaseStates, EvaluationOptions, TokenSums, paired_sums, token_sums
from training_lens.evaluation.harness import TaskOptions, TaskScores, run_tasks
from training_lens.evaluation.metrics import AnswerScoring
from training_lens.evaluation.model_scores import Bootstrap, ModelScores
from training_lens.evaluation.shared_answers import generate_shared_answers
from training_lens.evaluation.training_verdict import is_run_folder, read_training_record
from training_lens.evaluation.verdict import Verdict
from training_lens.inference.heldout_examples import filter_fitting
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import pluralize
from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes

logger = get_logger(__name__)


class BrokenAdapterError(EvaluationError):
    """An adapter's losses are not finite; `verdict` says so."""

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message)
        self.verdict = verdict


@dataclass(frozen=True)
class ModelOutcome:
    """One model's answer to each row ('' for rows without a prompt), and its scores.

    `finish_reasons` are `stop` or `length` (cut), or '' for rows without a prompt; `endings` summarize them.
    """

    answers: Sequence[str]
    scored: ModelScores
    finish_reasons: Sequence[str] = ()
    endings: Endings | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """The comparison, its rows and outcomes, and for two models the verdict."""

    comparison: ModelComparison
    rows: EvaluationRows
    outcomes: Mapping[str, ModelOutcome]
    verdict: Verdict | None = None


class ModelEvaluator:
    """Evaluates the model of a session on rows, rendered as in training; the package's docstring has an example."""

    def __init__(self, session: Session, settings: EvaluationSection, progress: Progress | None = None) -> None:
        self.session, self.settings, self.progress = session, settings, progress or Progress()
        self._length_buckets([1])  # wrong limits are refused before any work
        self._any_scoring = AnswerScoring.from_settings(settings)  # and so are unknown metrics

    def compare(self, examples: Sequence[Example]) -> EvaluationResult:
        """Compare the adapter with its base on these rows, with the controls and the forgetting.

        Raises:
            DatasetError: no row fits the model; EvaluationError: the model failed on them.
            BrokenAdapterError: the adapter's losses are not finite.
        """
        rows, session = EvaluationRows.from_examples(examples, self.session), self.session
        scoring = self.answer_scoring(rows)
        other_text = self.read_other_text()
        tasks = {BASE: self._run_tasks(base=True), ADAPTER: self._run_tasks()}
        base, adapter = self.score_pair(rows, "losses of base and adapter")
        outcomes = {
            BASE: self.score_answers(rows, base, scoring, BASE, base=True),
            ADAPTER: self.score_answers(rows, adapter, scoring, ADAPTER),
        }
        described = {BASE: session.config.model.id, ADAPTER: session.source}
        result = self._build_result(rows, outcomes, described, tasks, scoring, self._find_trained_rows(rows))
        controls = self._evaluate_controls(rows, outcomes[ADAPTER].scored, scoring) if self.settings.controls else {}
        forgot = None
        if other_text:
            forgot = measure_forgetting(*self.score_pair(other_text, "losses on other text"), self._bootstrap)
        comparison = replace(result.comparison, controls=controls, forgetting=forgot)
        return self._add_verdict(replace(result, comparison=comparison), scoring)

    def compare_with(self, other: ModelEvaluator, examples: Sequence[Example]) -> EvaluationResult:
        """Compare this adapter with another session's (as `base`), each with its own template, on rows that fit both.

        Raises:
            DatasetError: no row fits both; EvaluationError: a model failed on them.
        """
        fit_other = EvaluationRows.from_examples(examples, other.session)
        rows = EvaluationRows.from_examples(fit_other.examples, self.session)
        theirs = fit_other.take(rows.kept)
        if not np.array_equal(rows.tokens_id, theirs.tokens_id):
            logger.warning(
                "the two have different tokens for the same answers, so measures by token are not compared; "
                "bits_per_byte is"
            )
        scoring = self.answer_scoring(rows)
        tasks = {BASE: other._run_tasks(), ADAPTER: self._run_tasks()}
        names = distinct_names(other.session.source, self.session.source)
        outcomes = {
            BASE: other._evaluate_model(theirs, scoring, names[0]),
            ADAPTER: self._evaluate_model(rows, scoring, names[1]),
        }
        described = {BASE: other.session.source, ADAPTER: self.session.source}
        trained = self._find_trained_rows(rows).join(other._find_trained_rows(theirs))
        result = self._build_result(rows, outcomes, described, tasks, scoring, trained)
        labels = dict(zip((BASE, ADAPTER), names, strict=True))
        return self._add_verdict(replace(result, comparison=replace(result.comparison, labels=labels)), scoring)

    def evaluate(self, examples: Sequence[Example], *, base: bool = False) -> EvaluationResult:
        """Evaluate the session's model alone: the adapter, or the base if there is none or `base` is set.

        Raises:
            DatasetError: no row fits the model; EvaluationError: the model failed on them.
        """
        rows, session = EvaluationRows.from_examples(examples, self.session), self.session
        name = BASE if base or not session.has_adapter else ADAPTER
        tasks = {name: self._run_tasks(base=name == BASE)}
        scoring = self.answer_scoring(rows)
        outcome = self._evaluate_model(rows, scoring, name, base=name == BASE)
        described = {name: session.config.model.id if name == BASE else session.source}
        trained = self._find_trained_rows(rows)
        return self._build_result(rows, {name: outcome}, described, tasks, scoring, trained)

    def _find_trained_rows(self, rows: EvaluationRows) -> TrainedRows:
        return find_trained_rows(self.run, self.session, rows.dataset, self.progress)

    def answer_scoring(self, rows: EvaluationRows) -> AnswerScoring:
        """The scoring of answers; numbers are read as the right answers of all rows write them."""
        return self._any_scoring.adapt_to_references(rows.prompt_references, self.settings.decimal)

    def _build_result(
        self,
        rows: EvaluationRows,
        outcomes: dict[str, ModelOutcome],
        described: dict[str, str],
        tasks: dict[str, TaskScores],
        scoring: AnswerScoring,
        trained: TrainedRows,
    ) -> EvaluationResult:
        lengths, references = rows.dataset.lengths, rows.prompt_references
        scored = {name: outcome.scored for name, outcome in outcomes.items()}
        buckets = self._length_buckets(lengths)
        comparison = compare_models(rows.examples, lengths, scored, buckets, self._bootstrap, described, trained)
        endings = {name: outcome.endings for name, outcome in outcomes.items() if outcome.endings}
        comparison = replace(comparison, tasks=tasks if self.settings.tasks else {}, endings=endings)
        if self.settings.generate and references:
            unscored = scoring.count_unscored(references, [model.row_scores for model in scored.values()])
            comparison = replace(comparison, unscored=unscored, number_reading=scoring.reading)
        return EvaluationResult(comparison, rows, outcomes)

    def _add_verdict(self, result: EvaluationResult, scoring: AnswerScoring) -> EvaluationResult:
        run = self.run
        trained = result.comparison.trained.leaked
        is_new = np.ones(len(result.rows.examples), bool) if trained is None or trained.all() else ~trained
        verdict = assess_comparison(
            result.comparison,
            scoring,
            decide_by=self.settings.decide_by,
            distinct_rows=result.rows.take(np.flatnonzero(is_new)).count_distinct(),
            training=read_training_record(run) if run and run.metrics_file.is_file() else None,
            run=str(run.root) if run else "",
        )
        return replace(result, verdict=verdict)

    @property
    def trained_steps(self) -> int | None:
        """The steps of the run whose adapter is evaluated; None if it is not a run."""
        return int(self.run.read_metadata("summary.json").get("steps", 0)) if self.run else None

    @property
    def run(self) -> RunFolder | None:
        """The run whose adapter is evaluated; None for a bare adapter or a base."""
        return RunFolder(Path(self.session.source)) if is_run_folder(self.session.source) else None

    def _run_tasks(self, *, base: bool = False) -> TaskScores:
        """The scores of lm-eval's tasks, if any are configured."""
        settings = self.settings
        if not settings.tasks:
            return {}
        options = TaskOptions(settings.task_path, settings.task_limit, base, settings.batch_tokens, settings.seed)
        return run_tasks(self.session, settings.tasks, options, self.progress)

    def _length_buckets(self, lengths: Sequence[int] | np.ndarray) -> LengthBuckets:
        asked = self.settings.length_buckets
        if isinstance(asked, int):
            return LengthBuckets.from_quantiles(np.asarray(lengths), asked)
        return LengthBuckets.from_limits(asked)

    @property
    def _bootstrap(self) -> Bootstrap:
        return Bootstrap(self.settings.resamples, self.settings.confidence, self.settings.seed)

    def _evaluate_model(
        self, rows: EvaluationRows, scoring: AnswerScoring, who: str, *, base: bool = False
    ) -> ModelOutcome:
        with (
            self.progress.task(f"loss of the {who}", len(rows.examples)) as advance,
            base_only(self.session.model, base),
        ):
            sums = token_sums(self.session.model, rows.dataset, self._evaluation_options(advance))
        _require_finite(rows, sums, who)
        return self.score_answers(rows, ModelScores(sums, rows.text_bytes, rows.tokens_id), scoring, who, base=base)

    def _evaluation_options(self, advance: Callable[[float], None]) -> EvaluationOptions:
        session, budget = self.session, self.settings.batch_tokens
        return EvaluationOptions(Processes(session.device), session.precision, budget, session.pad_id, advance)

    def score_answers(
        self, rows: EvaluationRows, scored: ModelScores, scoring: AnswerScoring, who: str, *, base: bool = False
    ) -> ModelOutcome:
        """The outcome with greedy answers to the rows with a prompt, if `evaluation.generate` is on."""
        nothing = [""] * len(rows.examples)
        prompts = [prompt for prompt in rows.prompts if prompt is not None]
        if not prompts or not self.settings.generate:
            return ModelOutcome(nothing, scored, nothing)
        room = min(self.settings.max_new_tokens, int(rows.dataset.supervised_counts.max()) + SPARE_TOKENS)
        greedy = InferenceSection(max_new_tokens=room, batch_tokens=self.settings.batch_tokens)
        with self.progress.task(f"answers of the {who}", len(prompts)) as advance:
            processes = Processes(self.session.device)
            given = generate_shared_answers(self.session, prompts, greedy, processes, base=base, advance=advance)
        in_turn = iter(given)
        answers = [next(in_turn) if asked else None for asked in rows.has_prompt]
        scores = scored.with_answers([a.text for a in given], rows.prompt_references, rows.has_prompt, scoring)
        right = [e.input_ids[e.loss_mask] for e in rows.dataset.select(np.flatnonzero(rows.has_prompt))]
        is_cut = [answer.finish_reason == "length" for answer in given]
        return ModelOutcome(
            [answer.text if answer else "" for answer in answers],
            scores,
            [answer.finish_reason if answer else "" for answer in answers],
            summarize_endings([answer.token_ids for answer in given], is_cut, right, room),
        )

    def _evaluate_controls(
        self, rows: EvaluationRows, adapter: ModelScores, scoring: AnswerScoring
    ) -> dict[str, ControlResult]:
        """The adapter on corrupted prompts, over the rows whose supervised tokens stay the same."""
        domain_in_prompt = self.session.config.data.domain.style != "none"
        controls: dict[str, ControlResult] = {}
        for name, changed in corrupt_prompts(rows.examples, domain_in_prompt, self.settings.seed).items():
            corrupted = EvaluationRows.from_examples(list(changed.values()), self.session)
            places = np.array(list(changed))[corrupted.kept]  # of the original rows
            same = np.flatnonzero(corrupted.tokens_id == rows.tokens_id[places])
            if not len(same):
                logger.warning("no control '%s': prompts are supervised as well, so the supervised tokens change", name)
                continue
            outcome = self._evaluate_model(corrupted.take(same), scoring, f"adapter, {name.replace('_', ' ')}")
            controls[name] = compare_control(outcome.scored, adapter.take(places[same]), self._bootstrap)
        return controls

    def read_other_text(self) -> EvaluationRows | None:
        """The user's other text, with the default settings for its fields."""
        sources = self.settings.forgetting
        if sources is None:
            return None
        found = read_examples(sources, "evaluation.forgetting", DataSection())
        fitting = filter_fitting(found, self.session, self.settings.max_examples)
        return EvaluationRows.from_examples(fitting, self.session)

    def score_pair(
        self, rows: EvaluationRows, title: str, states: BaseStates | None = None
    ) -> tuple[ModelScores, ModelScores]:
        """The losses of base and adapter, and of the adapter its KL divergence from the base; `states`: its cache.

        Raises:
            EvaluationError: the model failed; BrokenAdapterError: the adapter's losses are not finite.
        """
        with self.progress.task(title, len(rows.examples)) as advance:
            sums = paired_sums(self.session.model, rows.dataset, self._evaluation_options(advance), states)
        _require_finite(rows, sums.base, BASE)
        _require_finite(rows, sums.adapter, ADAPTER)
        base = ModelScores(sums.base, rows.text_bytes, rows.tokens_id)
        return base, ModelScores(sums.adapter, rows.text_bytes, rows.tokens_id, kl=sums.kl)


def distinct_names(first: str, second: str) -> tuple[str, str]:
    """Names of two runs or adapters: the last parts of their paths, as many as make them differ.

    Example:
        >>> distinct_names("outputs/experiments/a/runs/r1", "outputs/experiments/b/runs/r1")
        ('a/runs/r1', 'b/runs/r1')
    """
    one, other = (Path(source).absolute().parts for source in (first, second))
    for count in range(1, max(len(one), len(other)) + 1):
        names = "/".join(one[-count:]), "/".join(other[-count:])
        if names[0] != names[1]:
            return names
    return f"{names[0]} (again)", names[1]


def _require_finite(rows: EvaluationRows, sums: TokenSums, who: str) -> None:
    """Refuse losses that are not finite; for an adapter, as a BrokenAdapterError."""
    wrong = np.flatnonzero(~np.isfinite(sums.nll))
    if not len(wrong):
        return
    what = (
        f"the loss of the {who} is not finite on {len(wrong)} of {pluralize(len(rows.examples), 'row')}, the first is "
        f"{rows.examples[wrong[0]].id}. Its weights may be broken, or its precision too small: try fp32."
    )
    if who != ADAPTER:
        raise EvaluationError(what)
    verdict = Verdict("worse", f"Worse: {what}", "comparison", "loss", rows=len(rows.examples))
    raise BrokenAdapterError(verdict.sentence, verdict)
