"""Models judged on rows: a run's adapter against its base or another run, or one model alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from training_lens.config.data_sections import DataSection
from training_lens.config.judging_sections import EvaluationSection, InferenceSection
from training_lens.data.preparation import prompt_as_trained, read_examples, tokenize
from training_lens.data.types import Example
from training_lens.evaluation.comparison import ADAPTER, BASE, Comparison, Control, Forgetting, compare, forgetting
from training_lens.evaluation.controls import controls_of
from training_lens.evaluation.evaluator import Pass, paired_sums, token_sums
from training_lens.evaluation.harness import TaskScores, run_tasks
from training_lens.evaluation.length_bucketing import LengthBuckets
from training_lens.evaluation.rows import JudgedRows
from training_lens.evaluation.scoring import Bootstrap, Scored
from training_lens.inference.generator import answers
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only
from training_lens.utils.processes import Processes
from training_lens.utils.progress import Progress

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
        tasks = {BASE: self._tasks(base=True), ADAPTER: self._tasks()}
        judged = self._judgement(
            rows, self._pair(rows), {BASE: session.config.model.id, ADAPTER: session.source}, tasks
        )
        controls = self._controls(rows) if self.settings.controls else {}
        comparison = replace(judged.comparison, controls=controls, forgetting=self._forgetting())
        return replace(judged, comparison=comparison)

    def against(self, other: Judge, examples: Sequence[Example]) -> Judgement:
        """This adapter against another session's (called `base`), each with its own template, on rows that fit both.

        Raises:
            DatasetError: no row fits both; EvaluationError: a model failed on them.
        """
        fits = tokenize(examples, other.session.preparation)
        rows = JudgedRows.of([e for e, tokens in zip(examples, fits, strict=True) if tokens], self.session)
        theirs = JudgedRows.of(rows.examples, other.session)
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
        return {
            BASE: self._answered(rows, Scored(sums.base, rows.text_bytes), BASE, base=True),
            ADAPTER: self._answered(rows, Scored(sums.adapter, rows.text_bytes, kl=sums.kl), ADAPTER),
        }

    def _alone(self, rows: JudgedRows, who: str, *, base: bool = False) -> Outcome:
        with (
            self.progress.task(f"loss of the {who}", len(rows.examples)) as advance,
            base_only(self.session.model, base),
        ):
            sums = token_sums(self.session.model, rows.dataset, self._pass(advance))
        return self._answered(rows, Scored(sums, rows.text_bytes), who, base=base)

    def _pass(self, advance: Callable[[float], None]) -> Pass:
        session, budget = self.session, self.settings.batch_tokens
        return Pass(Processes(session.device), session.precision, budget, session.pad_id, advance)

    def _answered(self, rows: JudgedRows, scored: Scored, who: str, *, base: bool = False) -> Outcome:
        """The outcome with the answers that the model gives, greedily, where answers are asked for."""
        said = [""] * len(rows.examples)
        asked = np.flatnonzero(rows.asked) if self.settings.generate else np.array([], dtype=np.int64)
        if not len(asked):
            return Outcome(said, scored)
        prompts = [prompt_as_trained(rows.examples[i], self.session.preparation) for i in asked]
        limit = min(self.settings.max_new_tokens, int(rows.dataset.supervised.max()) + SPARE_TOKENS)
        greedy = InferenceSection(max_new_tokens=limit, batch_tokens=self.settings.batch_tokens)
        with self.progress.task(f"answers of the {who}", len(prompts)) as advance:
            given = answers(self.session, prompts, greedy, base=base, advance=advance)
        for place, text in zip(asked, given, strict=True):
            said[place] = text
        return Outcome(said, scored.with_answers(given, [rows.references[i] for i in asked], rows.asked))

    def _controls(self, rows: JudgedRows) -> dict[str, Control]:
        told = self.session.config.data.domain.style != "none"
        controls: dict[str, Control] = {}
        for name, changed in controls_of(rows.examples, told, self.settings.seed).items():
            fitting = JudgedRows.of(changed, self.session)
            scored = self._alone(fitting, f"adapter, {name.replace('_', ' ')}").scored
            controls[name] = Control(len(scored), scored.of(np.ones(len(scored), dtype=bool)))
        return controls

    def _forgetting(self) -> Forgetting | None:
        """The loss of base and adapter on the user's other text, read on its own terms."""
        sources = self.settings.forgetting
        if sources is None:
            return None
        examples = list(
            islice(read_examples(sources, "evaluation.forgetting", DataSection()), self.settings.max_examples)
        )
        rows = JudgedRows.of(examples, self.session)
        with self.progress.task("losses on other text", len(rows.examples)) as advance:
            sums = paired_sums(self.session.model, rows.dataset, self._pass(advance))
        base, adapter = (Scored(s, rows.text_bytes) for s in (sums.base, sums.adapter))
        return forgetting(base, adapter, self._bootstrap)
