"""Models judged on rows: a run's adapter against its base or another run, or one model alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from training_lens.config.data_sections import DataSection
from training_lens.config.judging_sections import EvaluationSection, InferenceSection
from training_lens.data.examples import Example
from training_lens.data.source_reader import read_examples
from training_lens.display.progress import Progress
from training_lens.errors import EvaluationError
from training_lens.evaluation.comparison import (
    ADAPTER,
    BASE,
    Comparison,
    Control,
    Forgetting,
    compare,
    control,
    forgetting,
)
from training_lens.evaluation.comparison_verdict import judge_comparison
from training_lens.evaluation.controls import controls_of
from training_lens.evaluation.endings import SPARE_TOKENS, Endings, summarize_endings
from training_lens.evaluation.evaluation_rows import JudgedRows
from training_lens.evaluation.evaluator import Pass, TokenSums, paired_sums, token_sums
from training_lens.evaluation.harness import TaskScores, run_tasks
from training_lens.evaluation.length_bucketing import LengthBuckets
from training_lens.evaluation.metrics import AnswerScoring
from training_lens.evaluation.scoring import Bootstrap, Scored
from training_lens.evaluation.training_record import read_training_record
from training_lens.evaluation.training_verdict import is_run_folder
from training_lens.evaluation.verdict import Verdict, count_rows
from training_lens.inference.generator import GeneratedAnswer, generate_answers
from training_lens.inference.prompt_rows import fitting
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes

logger = get_logger(__name__)


class BrokenAdapterError(EvaluationError):
    """An adapter's losses are no numbers; `verdict` says so."""

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message)
        self.verdict = verdict


@dataclass(frozen=True)
class Outcome:
    """What one model made of the rows: its answer to each ('' where none was asked), and what it is scored by.

    `finish_reasons` are `stop` or `length` (cut), '' where no answer was asked; `endings` sum them up.
    """

    answers: Sequence[str]
    scored: Scored
    finish_reasons: Sequence[str] = ()
    endings: Endings | None = None


@dataclass(frozen=True)
class Judgement:
    """The scores, and the rows and outcomes that they are of; the verdict, where two models were judged."""

    comparison: Comparison
    rows: JudgedRows
    outcomes: Mapping[str, Outcome]
    verdict: Verdict | None = None


class Judge:
    """Judges the model of a session on rows rendered as it was trained.

    Args:
        settings: what to measure, and how many tokens may go through the model at once.
        progress: where bars are drawn.

    Example:
        session = open_run(find_run("latest", "outputs", "default", finished=True))
        judge = Judge(session, EvaluationSection(generate=False))
        judge.compare(examples).comparison.whole.delta["loss"]
    """

    def __init__(self, session: Session, settings: EvaluationSection, progress: Progress | None = None) -> None:
        self.session, self.settings, self.progress = session, settings, progress or Progress()
        self._buckets([1])  # wrong limits are told before the work, not after it
        self._any_scoring = AnswerScoring.from_settings(settings)  # so is a metric that is not there

    def compare(self, examples: Sequence[Example]) -> Judgement:
        """The adapter against its base on these rows, with the controls and the measures of forgetting.

        Raises:
            DatasetError: no row fits the model; EvaluationError: the model failed on them.
            BrokenAdapterError: the adapter's losses are no numbers.
        """
        rows, session = JudgedRows.of(examples, self.session), self.session
        scoring = self._scoring(rows)
        other_text = self._other_text()
        tasks = {BASE: self._tasks(base=True), ADAPTER: self._tasks()}
        outcomes = self._pair(rows, scoring)
        judged = self._judgement(rows, outcomes, {BASE: session.config.model.id, ADAPTER: session.source}, tasks)
        controls = self._controls(rows, outcomes[ADAPTER].scored, scoring) if self.settings.controls else {}
        forgot = self._forgetting(other_text) if other_text else None
        comparison = replace(judged.comparison, controls=controls, forgetting=forgot)
        return self._with_verdict(replace(judged, comparison=comparison), scoring)

    def against(self, other: Judge, examples: Sequence[Example]) -> Judgement:
        """This adapter against another session's (called `base`), each with its own template, on rows that fit both.

        Raises:
            DatasetError: no row fits both; EvaluationError: a model failed on them.
        """
        fit_other = JudgedRows.of(examples, other.session)
        rows = JudgedRows.of(fit_other.examples, self.session)
        theirs = fit_other.take(rows.kept)
        if not np.array_equal(rows.tokens_id, theirs.tokens_id):
            logger.warning(
                "the two have different tokens for the same answers, so measures by token are not compared; "
                "bits_per_byte is"
            )
        scoring = self._scoring(rows)
        tasks = {BASE: other._tasks(), ADAPTER: self._tasks()}
        names = distinct_names(other.session.source, self.session.source)
        outcomes = {
            BASE: other._alone(theirs, scoring, names[0]),
            ADAPTER: self._alone(rows, scoring, names[1]),
        }
        judged = self._judgement(rows, outcomes, {BASE: other.session.source, ADAPTER: self.session.source}, tasks)
        labels = dict(zip((BASE, ADAPTER), names, strict=True))
        return self._with_verdict(replace(judged, comparison=replace(judged.comparison, labels=labels)), scoring)

    def alone(self, examples: Sequence[Example], *, base: bool = False) -> Judgement:
        """The session's model alone: its adapter, or the base where there is none, or `base` asks for it.

        Raises:
            DatasetError: no row fits the model; EvaluationError: the model failed on them.
        """
        rows, session = JudgedRows.of(examples, self.session), self.session
        name = BASE if base or not session.has_adapter else ADAPTER
        tasks = {name: self._tasks(base=name == BASE)}
        outcome = self._alone(rows, self._scoring(rows), name, base=name == BASE)
        described = {name: session.config.model.id if name == BASE else session.source}
        return self._judgement(rows, {name: outcome}, described, tasks)

    def _scoring(self, rows: JudgedRows) -> AnswerScoring:
        """How answers are scored: numbers as the right answers of all rows are written, whatever part is judged."""
        return self._any_scoring.for_references(rows.asked_references, self.settings.decimal)

    def _judgement(
        self, rows: JudgedRows, outcomes: dict[str, Outcome], described: dict[str, str], tasks: dict[str, TaskScores]
    ) -> Judgement:
        lengths = rows.dataset.lengths
        scored = {name: outcome.scored for name, outcome in outcomes.items()}
        comparison = compare(rows.examples, lengths, scored, self._buckets(lengths), self._bootstrap, described)
        scoring, answered = self._scoring(rows), self.settings.generate and rows.asked.any()
        return Judgement(
            replace(
                comparison,
                tasks=tasks if self.settings.tasks else {},
                endings={name: outcome.endings for name, outcome in outcomes.items() if outcome.endings},
                unscored=scoring.count_unscored(rows.asked_references) if answered else {},
                number_reading=scoring.reading if answered else "",
            ),
            rows,
            outcomes,
        )

    def _with_verdict(self, judged: Judgement, scoring: AnswerScoring) -> Judgement:
        run = self.run
        verdict = judge_comparison(
            judged.comparison,
            scoring,
            decide_by=self.settings.decide_by,
            distinct_rows=judged.rows.count_distinct(),
            training=read_training_record(run) if run and run.metrics.is_file() else None,
            run=str(run.root) if run else "",
        )
        return replace(judged, verdict=verdict)

    @property
    def trained_steps(self) -> int | None:
        """After how many steps the run whose adapter is judged had ended; None for what is no run."""
        return int(self.run.read_metadata("summary.json").get("steps", 0)) if self.run else None

    @property
    def run(self) -> RunFolder | None:
        """The run whose adapter is judged; None for a bare adapter or base."""
        return RunFolder(Path(self.session.source)) if is_run_folder(self.session.source) else None

    def _tasks(self, *, base: bool = False) -> TaskScores:
        """The scores of lm-eval's tasks, where any are asked for."""
        asked = self.settings
        if not asked.tasks:
            return {}
        return run_tasks(
            self.session,
            asked.tasks,
            include_path=asked.task_path,
            limit=asked.task_limit,
            base=base,
            batch_tokens=asked.batch_tokens,
            seed=asked.seed,
            progress=self.progress,
        )

    def _buckets(self, lengths: Sequence[int] | np.ndarray) -> LengthBuckets:
        asked = self.settings.length_buckets
        if isinstance(asked, int):
            return LengthBuckets.by_quantiles(np.asarray(lengths), asked)
        return LengthBuckets.by_limits(asked)

    @property
    def _bootstrap(self) -> Bootstrap:
        return Bootstrap(self.settings.resamples, self.settings.confidence, self.settings.seed)

    def _pair(self, rows: JudgedRows, scoring: AnswerScoring) -> dict[str, Outcome]:
        """Base and adapter: losses and their divergence in one pass, then answers."""
        with self.progress.task("losses of base and adapter", len(rows.examples)) as advance:
            sums = paired_sums(self.session.model, rows.dataset, self._pass(advance))
        _require_finite(rows, sums.base, BASE)
        _require_finite(rows, sums.adapter, ADAPTER)
        base = Scored(sums.base, rows.text_bytes, rows.tokens_id)
        adapter = Scored(sums.adapter, rows.text_bytes, rows.tokens_id, kl=sums.kl)
        return {
            BASE: self._answered(rows, base, scoring, BASE, base=True),
            ADAPTER: self._answered(rows, adapter, scoring, ADAPTER),
        }

    def _alone(self, rows: JudgedRows, scoring: AnswerScoring, who: str, *, base: bool = False) -> Outcome:
        with (
            self.progress.task(f"loss of the {who}", len(rows.examples)) as advance,
            base_only(self.session.model, base),
        ):
            sums = token_sums(self.session.model, rows.dataset, self._pass(advance))
        _require_finite(rows, sums, who)
        return self._answered(rows, Scored(sums, rows.text_bytes, rows.tokens_id), scoring, who, base=base)

    def _pass(self, advance: Callable[[float], None]) -> Pass:
        session, budget = self.session, self.settings.batch_tokens
        return Pass(Processes(session.device), session.precision, budget, session.pad_id, advance)

    def _answered(
        self, rows: JudgedRows, scored: Scored, scoring: AnswerScoring, who: str, *, base: bool = False
    ) -> Outcome:
        """The outcome with the answers that the model gives, greedily, where answers are asked for."""
        nothing = [""] * len(rows.examples)
        prompts = [prompt for prompt in rows.prompts if prompt is not None]
        if not prompts or not self.settings.generate:
            return Outcome(nothing, scored, nothing)
        room = min(self.settings.max_new_tokens, int(rows.dataset.supervised.max()) + SPARE_TOKENS)
        greedy = InferenceSection(max_new_tokens=room, batch_tokens=self.settings.batch_tokens)
        with self.progress.task(f"answers of the {who}", len(prompts)) as advance:
            given = generate_answers(self.session, prompts, greedy, base=base, advance=advance)
        asked = np.flatnonzero(rows.asked)
        texts, reasons = dict.fromkeys(range(len(nothing)), ""), dict.fromkeys(range(len(nothing)), "")
        for place, answer in zip(asked.tolist(), given, strict=True):
            texts[place], reasons[place] = answer.text, answer.finish_reason
        scores = scored.with_answers([a.text for a in given], rows.asked_references, rows.asked, scoring)
        return Outcome([*texts.values()], scores, [*reasons.values()], _endings(rows, given, room))

    def _controls(self, rows: JudgedRows, adapter: Scored, scoring: AnswerScoring) -> dict[str, Control]:
        """The adapter on changed prompts, over those rows of which the supervised tokens stay what they were."""
        told = self.session.config.data.domain.style != "none"
        controls: dict[str, Control] = {}
        for name, changed in controls_of(rows.examples, told, self.settings.seed).items():
            spoilt = JudgedRows.of(list(changed.values()), self.session)
            places = np.array(list(changed))[spoilt.kept]  # of the original rows
            same = np.flatnonzero(spoilt.tokens_id == rows.tokens_id[places])
            if not len(same):
                logger.warning("no control '%s': the prompts are learned as well, so nothing stays the same", name)
                continue
            outcome = self._alone(spoilt.take(same), scoring, f"adapter, {name.replace('_', ' ')}")
            controls[name] = control(outcome.scored, adapter.take(places[same]), self._bootstrap)
        return controls

    def _other_text(self) -> JudgedRows | None:
        """The user's other text, read on its own terms."""
        sources = self.settings.forgetting
        if sources is None:
            return None
        found = read_examples(sources, "evaluation.forgetting", DataSection())
        return JudgedRows.of(fitting(found, self.session, self.settings.max_examples), self.session)

    def _forgetting(self, rows: JudgedRows) -> Forgetting:
        """The losses of base and adapter on other text."""
        with self.progress.task("losses on other text", len(rows.examples)) as advance:
            sums = paired_sums(self.session.model, rows.dataset, self._pass(advance))
        _require_finite(rows, sums.base, BASE)
        _require_finite(rows, sums.adapter, ADAPTER)
        base, adapter = (Scored(s, rows.text_bytes, rows.tokens_id) for s in (sums.base, sums.adapter))
        return forgetting(base, adapter, self._bootstrap)


def _endings(rows: JudgedRows, given: Sequence[GeneratedAnswer], room: int) -> Endings:
    """How the answers end, held against the supervised tokens of the rows that were asked."""
    right = [example.input_ids[example.loss_mask] for example in rows.dataset.select(np.flatnonzero(rows.asked))]
    is_cut = [answer.finish_reason == "length" for answer in given]
    return summarize_endings([answer.token_ids for answer in given], is_cut, right, room)


def distinct_names(first: str, second: str) -> tuple[str, str]:
    """What two runs or adapters are called: the last parts of their paths, as many as tell them apart.

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


def _require_finite(rows: JudgedRows, sums: TokenSums, who: str) -> None:
    """Refuse losses that are no numbers: no measure could be made of them.

    Raises:
        EvaluationError: names how many rows, and the first; BrokenAdapterError: of an adapter.
    """
    wrong = np.flatnonzero(~np.isfinite(sums.nll))
    if not len(wrong):
        return
    what = (
        f"the loss of the {who} is not finite on {len(wrong)} of {count_rows(len(rows.examples))}, the first is "
        f"{rows.examples[wrong[0]].id}. Its weights may be broken, or its precision too small: try fp32."
    )
    if who != ADAPTER:
        raise EvaluationError(what)
    verdict = Verdict("worse", f"Worse: {what}", "comparison", "loss", rows=len(rows.examples))
    raise BrokenAdapterError(verdict.sentence, verdict)
