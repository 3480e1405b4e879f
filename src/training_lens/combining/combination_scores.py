"""Losses of base, adapters and their combination, on the validation rows of each adapter's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

from training_lens.combining.parents import BASE, COMBINATION, Parent
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError
from training_lens.evaluation.evaluation_rows import EvaluationRows, TrainedRows, find_trained_rows
from training_lens.evaluation.evaluator import BaseStates
from training_lens.evaluation.model_scores import Bootstrap, ModelScores
from training_lens.evaluation.run_evaluation import ModelEvaluator
from training_lens.evaluation.verdict import Interval
from training_lens.inference.session import Session
from training_lens.utils.formatting import format_interval


@dataclass(frozen=True)
class TaskRows:
    """The rows of one adapter's run, in that run's own session; `trained` are those that any run trained on."""

    name: str
    session: Session
    rows: EvaluationRows
    trained: TrainedRows


@dataclass(frozen=True)
class TaskScores:
    """What each model loses on the rows of run `name`: base, every adapter by its name, combination.

    `change` is the combination's loss minus that of the run's own adapter, `from_base` minus the base's, each with its
    paired interval over rows. `answers` are the scores of each model's answers, where asked for. `gain_kept` is the
    share of that adapter's gain over the base, None where it has none.
    """

    name: str
    rows: int
    supervised_tokens: int
    losses: Mapping[str, float]
    answers: Mapping[str, float]
    change: float
    change_interval: Interval | None
    from_base: float
    from_base_interval: Interval | None
    gain_kept: float | None
    trained: TrainedRows

    @property
    def is_worse_than_base(self) -> bool:
        return self.from_base > 0

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "trained": self.trained.as_json(), "worse_than_base": self.is_worse_than_base}

    def describe(self, metric: str | None = None) -> str:
        """Which task lost how much; `metric` is the name of that of the answers."""
        changes = "loses" if self.change > 0 else "gains"
        interval = format_interval(self.change_interval)
        what = f"the task of {self.name} {changes} {abs(self.change):.4f} nats (change of its loss: {interval})"
        if self.gain_kept is not None:
            what += f", {max(self.gain_kept, 0):.0%} of its gain over the base is kept"
        if metric:
            own = self.answers[self.name]
            what += f"; {metric} is {self.answers[COMBINATION]:.3f}, and {own:.3f} with its own adapter"
        return what

    def describe_harm(self) -> str:
        interval = format_interval(self.from_base_interval)
        return (
            f"on the rows of {self.name} the combination is worse than the base, by {self.from_base:.4f} nats "
            f"({interval}). Try other --weights, another --how, or both side by side: training-lens serve RUN RUN"
        )


def collect_rows(
    parents: Sequence[Parent], sessions: Sequence[Session], rows: Sequence[EvaluationRows], progress: Progress
) -> list[TaskRows]:
    """The rows of each run, compared with the training rows of all: the combination was trained on all of them."""
    found = []
    for parent, session, own in zip(parents, sessions, rows, strict=True):
        each = [
            find_trained_rows(other.run, its_session, own.dataset, progress)
            for other, its_session in zip(parents, sessions, strict=True)
        ]
        found.append(TaskRows(parent.name, session, own, reduce(TrainedRows.join, each)))
    return found


def score_combination(
    tasks: Sequence[TaskRows],
    combination: Session,
    settings: EvaluationSection,
    metric: str | None,
    progress: Progress,
) -> list[TaskScores]:
    """Score base, adapters and combination on the rows of each run, rendered as that run trained.

    Cost: on the rows of each run a pass of the base, and one of each adapter and of the combination; with a metric also
    the answers of each.

    Raises:
        EvaluationError: a model failed, or has losses that are not finite.
        ConfigurationError: there is no such metric.
    """
    models = {task.name: task.session for task in tasks} | {COMBINATION: combination}
    bootstrap = Bootstrap(settings.resamples, settings.confidence, settings.seed)
    return [
        _summarize(task, _score_models(task, models, settings, metric, progress), bootstrap, metric) for task in tasks
    ]


def _score_models(
    task: TaskRows, models: Mapping[str, Session], settings: EvaluationSection, metric: str | None, progress: Progress
) -> dict[str, ModelScores]:
    states, found = BaseStates(), dict[str, ModelScores]()
    for name, model in models.items():
        session = replace(task.session, model=model.model, adapter=model.adapter, source=model.source)
        evaluator = ModelEvaluator(session, settings, progress)
        base, scored = evaluator.score_pair(task.rows, f"{name} on the rows of {task.name}", states)
        scoring = evaluator.answer_scoring(task.rows)
        if metric and BASE not in found:
            base = evaluator.score_answers(task.rows, base, scoring, BASE, base=True).scored
        if metric:
            scored = evaluator.score_answers(task.rows, scored, scoring, name).scored
            if metric not in (known := scored.measure_all()):
                raise ConfigurationError(f"--metric {metric}: there are {', '.join(known)}.")
        found.setdefault(BASE, base)
        found[name] = scored
    return found


def _summarize(
    task: TaskRows, scores: Mapping[str, ModelScores], bootstrap: Bootstrap, metric: str | None
) -> TaskScores:
    measured = {name: scored.measure_all() for name, scored in scores.items()}
    losses = {name: measures["loss"] for name, measures in measured.items()}
    draws = bootstrap.draw_measure([scores[BASE], scores[task.name], scores[COMBINATION]], "loss")
    gain = losses[BASE] - losses[task.name]
    is_single = len(task.rows.examples) < 2
    return TaskScores(
        name=task.name,
        rows=len(task.rows.examples),
        supervised_tokens=int(task.rows.dataset.supervised_counts.sum()),
        losses=losses,
        answers={name: measures[metric] for name, measures in measured.items()} if metric else {},
        change=losses[COMBINATION] - losses[task.name],
        change_interval=None if is_single else bootstrap.find_ends(draws[:, 2] - draws[:, 1]),
        from_base=losses[COMBINATION] - losses[BASE],
        from_base_interval=None if is_single else bootstrap.find_ends(draws[:, 2] - draws[:, 0]),
        gain_kept=(losses[BASE] - losses[COMBINATION]) / gain if gain > 0 else None,
        trained=task.trained,
    )
