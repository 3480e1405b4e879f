"""Models judged on rows: a run's adapter against its base or another run, or one model alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from training_lens.config.data_sections import DataSection
from training_lens.config.judging_sections import EvaluationSection, InferenceSection
from training_lens.data.reading import read_examples
from training_lens.data.types import Example
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
from training_lens.evaluation.controls import controls_of
from training_lens.evaluation.evaluator import Pass, TokenSums, paired_sums, token_sums
from training_lens.evaluation.harness import TaskScores, run_tasks
from training_lens.evaluation.length_bucketing import LengthBuckets
from training_lens.evaluation.rows import JudgedRows
from training_lens.evaluation.scoring import Bootstrap, Scored
from training_lens.inference.generator import answers
from training_lens.inference.rows import fitting
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only
from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes
from training_lens.utils.progress import Progress

logger = get_logger(__name__)
SPARE_TOKENS = 16  # generated beyond the longest reference: an answer that goes on past it is wrong anyway


@dataclass(frozen=True)
class Outcome:
    """What one model made of the rows: its answer to each ('' where none was asked), and what it is scored by."""

    answers: Sequence[str]
    scored: Scored


@dataclass(frozen=True)
class Judgement:
    """The scores, and the rows and outcomes that they are of."""

    comparison: Comparison
    rows: JudgedRows
    outcomes: Mapping[str, Outcome]


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

    def compare(self, examples: Sequence[Example]) -> Judgement:
        """The adapter against its base on these rows, with the controls and the measures of forgetting.

        Raises:
            DatasetError: no row fits the model; EvaluationError: the model failed on them.
        """
        rows, session = JudgedRows.of(examples, self.session), self.session
        other_text = self._other_text()
        tasks = {BASE: self._tasks(base=True), ADAPTER: self._tasks()}
        outcomes = self._pair(rows)
        judged = self._judgement(rows, outcomes, {BASE: session.config.model.id, ADAPTER: session.source}, tasks)
        controls = self._controls(rows, outcomes[ADAPTER].scored) if self.settings.controls else {}
        forgot = self._forgetting(other_text) if other_text else None
        return replace(judged, comparison=replace(judged.comparison, controls=controls, forgetting=forgot))

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
        tasks = {BASE: other._tasks(), ADAPTER: self._tasks()}
        outcomes = {BASE: other._alone(theirs, "other run"), ADAPTER: self._alone(rows, "run")}
        return self._judgement(rows, outcomes, {BASE: other.session.source, ADAPTER: self.session.source}, tasks)

    def alone(self, examples: Sequence[Example], *, base: bool = False) -> Judgement:
        """The session's model alone: its adapter, or the base where there is none, or `base` asks for it.

        Raises:
            DatasetError: no row fits the model; EvaluationError: the model failed on them.
        """
        rows, session = JudgedRows.of(examples, self.session), self.session
        name = BASE if base or not session.has_adapter else ADAPTER
        tasks = {name: self._tasks(base=name == BASE)}
        outcome = self._alone(rows, name, base=name == BASE)
        described = {name: session.config.model.id if name == BASE else session.source}
        return self._judgement(rows, {name: outcome}, described, tasks)

    def _judgement(
        self, rows: JudgedRows, outcomes: dict[str, Outcome], described: dict[str, str], tasks: dict[str, TaskScores]
    ) -> Judgement:
        lengths = rows.dataset.lengths
        scored = {name: outcome.scored for name, outcome in outcomes.items()}
        comparison = compare(rows.examples, lengths, scored, self._buckets(lengths), self._bootstrap, described)
        return Judgement(replace(comparison, tasks=tasks if self.settings.tasks else {}), rows, outcomes)

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

    def _pair(self, rows: JudgedRows) -> dict[str, Outcome]:
        """Base and adapter: losses and their divergence in one pass, then answers."""
        with self.progress.task("losses of base and adapter", len(rows.examples)) as advance:
            sums = paired_sums(self.session.model, rows.dataset, self._pass(advance))
        _require_finite(rows, sums.base, BASE)
        _require_finite(rows, sums.adapter, ADAPTER)
        return {
            BASE: self._answered(rows, Scored(sums.base, rows.text_bytes, rows.tokens_id), BASE, base=True),
            ADAPTER: self._answered(rows, Scored(sums.adapter, rows.text_bytes, rows.tokens_id, kl=sums.kl), ADAPTER),
        }

    def _alone(self, rows: JudgedRows, who: str, *, base: bool = False) -> Outcome:
        with (
            self.progress.task(f"loss of the {who}", len(rows.examples)) as advance,
            base_only(self.session.model, base),
        ):
            sums = token_sums(self.session.model, rows.dataset, self._pass(advance))
        _require_finite(rows, sums, who)
        return self._answered(rows, Scored(sums, rows.text_bytes, rows.tokens_id), who, base=base)

    def _pass(self, advance: Callable[[float], None]) -> Pass:
        session, budget = self.session, self.settings.batch_tokens
        return Pass(Processes(session.device), session.precision, budget, session.pad_id, advance)

    def _answered(self, rows: JudgedRows, scored: Scored, who: str, *, base: bool = False) -> Outcome:
        """The outcome with the answers that the model gives, greedily, where answers are asked for."""
        said = [""] * len(rows.examples)
        prompts = [prompt for prompt in rows.prompts if prompt is not None]
        if not prompts or not self.settings.generate:
            return Outcome(said, scored)
        asked = np.flatnonzero(rows.asked)
        limit = min(self.settings.max_new_tokens, int(rows.dataset.supervised.max()) + SPARE_TOKENS)
        greedy = InferenceSection(max_new_tokens=limit, batch_tokens=self.settings.batch_tokens)
        with self.progress.task(f"answers of the {who}", len(prompts)) as advance:
            given = answers(self.session, prompts, greedy, base=base, advance=advance)
        for place, text in zip(asked, given, strict=True):
            said[place] = text
        return Outcome(said, scored.with_answers(given, [rows.references[i] for i in asked], rows.asked))

    def _controls(self, rows: JudgedRows, adapter: Scored) -> dict[str, Control]:
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
            outcome = self._alone(spoilt.take(same), f"adapter, {name.replace('_', ' ')}")
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


def _require_finite(rows: JudgedRows, sums: TokenSums, who: str) -> None:
    """Refuse losses that are no numbers: no measure could be made of them.

    Raises:
        EvaluationError: names how many rows, and the first.
    """
    wrong = np.flatnonzero(~np.isfinite(sums.nll))
    if len(wrong):
        raise EvaluationError(
            f"the loss of the {who} is not finite on {len(wrong)} of {len(rows.examples)} rows, the first is "
            f"{rows.examples[wrong[0]].id}. Its weights may be broken, or its precision too small: try fp32."
        )
