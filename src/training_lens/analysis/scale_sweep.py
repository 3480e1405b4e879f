"""The knob: a finished adapter's update times 0 to 1.5, against loss, KL to the base and the loss on general text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from training_lens.analysis.run_rows import RowOptions, open_rows
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.display.progress import Progress
from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.evaluation.evaluation_rows import EvaluationRows, sample_base_text
from training_lens.evaluation.evaluator import BaseStates
from training_lens.evaluation.model_scores import Bootstrap, ModelScores
from training_lens.evaluation.run_evaluation import BrokenAdapterError, ModelEvaluator
from training_lens.evaluation.verdict import Interval
from training_lens.inference.session import Session
from training_lens.measures.curves import quadratic_minimum
from training_lens.models.adapter_scale import adapter_layers, scaled_adapter
from training_lens.models.adapters import restore_adapter
from training_lens.runs.checkpoint_format import list_checkpoints, verify_checkpoint
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import hash_file
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5)
LARGEST_SCALE = 10.0
KEPT = 0.95  # of the gain, by the point that is offered


@dataclass(frozen=True)
class KnobOptions:
    """What is measured. `metric`: of the answers, such as exact_match; `checkpoints`: those that the run kept, too."""

    scales: Sequence[float] = SCALES
    metric: str | None = None
    checkpoints: bool = True

    def list_scales(self) -> list[float]:
        """Ascending, with 0 (the base) and 1 (as trained), which the others are measured against.

        Raises:
            ConfigurationError: a scale is not a number from 0 to 10.
        """
        if wrong := [scale for scale in self.scales if not 0 <= scale <= LARGEST_SCALE]:
            raise ConfigurationError(f"--scales: {wrong[0]:g} is not from 0 to {LARGEST_SCALE:g}.")
        return sorted({0.0, 1.0, *self.scales})


@dataclass(frozen=True)
class KnobPoint:
    """One adapter: the run's at a scale, or a checkpoint's as it was (`scale` None). Losses in nats per token.

    `change` and `general_change` are against the base's loss; `gain_kept` is the share of the gain at scale 1. Each
    interval is of the value before it: paired over rows, None with a single row.
    """

    name: str
    scale: float | None
    step: int | None
    loss: float
    change: float
    change_interval: Interval | None
    gain_kept: float | None
    gain_kept_interval: Interval | None
    kl: float
    kl_interval: Interval | None
    general_loss: float
    general_change: float
    general_change_interval: Interval | None
    general_kl: float
    metric: float | None = None
    metric_interval: Interval | None = None


@dataclass(frozen=True)
class Knob:
    """What was measured, in the order of the scales, then of the checkpoints' steps.

    `optimum` is the scale of the lowest loss by a parabola through the lowest point and its neighbours, None at an end
    of the grid. `offered` is the name of the point that keeps 95 % of the gain at the least KL, None with a `reason`.
    """

    run: str
    rows: int
    supervised_tokens: int
    general_rows: int
    general_tokens: int
    general_source: str
    metric: str | None
    confidence: float
    base_loss: float
    base_general_loss: float
    points: tuple[KnobPoint, ...]
    optimum: float | None
    optimum_interval: Interval | None
    offered: str | None
    reason: str
    notes: tuple[str, ...]
    passes: int
    tokens: int  # of the task's and the general rows, each read in every pass

    def find(self, name: str | None) -> KnobPoint | None:
        """The point of a name."""
        return next((point for point in self.points if point.name == name), None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Measured:
    """One adapter's scores on the task's rows, on general text, and where asked with answers."""

    name: str
    scale: float | None
    step: int | None
    task: ModelScores
    general: ModelScores
    answers: ModelScores | None


def measure_knob(
    run: RunFolder,
    rows: RowOptions,
    settings: EvaluationSection,
    options: KnobOptions,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _line: None,
) -> Knob:
    """Measure the run's adapter at each scale, and the checkpoints that it kept.

    Args:
        settings: of the measures and intervals; `forgetting` are the sources of general text, None: text that the base
            samples, with `seed`.
        announce: called with the cost in passes and tokens, before they are made.

    Cost: one pass of the base and one for each point over the task's rows and the general text; with a metric also the
    answers at each point.

    Raises:
        CheckpointError, AdapterError: the run is not finished, or cannot be loaded or scaled.
        ConfigurationError, DatasetError: there are no rows, a scale or the metric is wrong.
        EvaluationError: the model failed on them.
    """
    scales = options.list_scales()
    session, task = open_rows(run, rows)
    evaluator = ModelEvaluator(session, settings, progress)
    other = evaluator.read_other_text()
    general = other or sample_base_text(session, settings.seed, evaluator.progress)
    checkpoints = dict(_list_other_checkpoints(run)) if options.checkpoints else {}
    passes = 1 + len(scales) + len(checkpoints)
    tokens = sum(int(part.dataset.lengths.sum()) for part in (task, general))
    announce(_describe_cost(passes, tokens, len(task.prompt_references) if options.metric else 0))
    sweep = _KnobSweep(evaluator, task, general, options.metric)
    points = [*sweep.measure_scales(scales), *sweep.measure_checkpoints(checkpoints, run.adapter)]
    bootstrap = Bootstrap(settings.resamples, settings.confidence, settings.seed)
    assert sweep.base is not None
    found = Knob(
        run=str(run.root),
        rows=len(task.examples),
        supervised_tokens=int(task.dataset.supervised_counts.sum()),
        general_rows=len(general.examples),
        general_tokens=int(general.dataset.supervised_counts.sum()),
        general_source=", ".join(map(str, settings.forgetting or ())) or "text that the base sampled",
        metric=options.metric,
        confidence=settings.confidence,
        base_loss=sweep.base.task.measure_all()["loss"],
        base_general_loss=sweep.base.general.measure_all()["loss"],
        points=tuple(summarize_points(sweep.base, points, bootstrap, options.metric)),
        optimum=None,
        optimum_interval=None,
        offered=None,
        reason="",
        notes=(*_describe_scaling(session), *sweep.notes),
        passes=passes,
        tokens=tokens,
    )
    optimum, interval = find_optimum([point for point in points if point.scale is not None], bootstrap)
    offered, reason = choose_point(found.points)
    return replace(found, optimum=optimum, optimum_interval=interval, offered=offered, reason=reason)


def _describe_cost(passes: int, tokens: int, prompts: int) -> str:
    answers = f", and {passes - 1} times {prompts:,} answers" if prompts else ""
    return f"{passes} passes over {tokens:,} tokens{answers}"


def _list_other_checkpoints(run: RunFolder) -> Iterator[tuple[int, Path]]:
    """The intact checkpoints whose adapter is not the run's, by step."""
    own = {hash_file(path) for path in run.adapter.glob("*.safetensors")}
    for folder in list_checkpoints(run.checkpoints):
        try:
            step, adapter = verify_checkpoint(folder).step, folder / "adapter"
        except CheckpointError as error:
            logger.warning("left out: %s", error)
            continue
        if {hash_file(path) for path in adapter.glob("*.safetensors")} != own:
            yield step, adapter


def _describe_scaling(session: Session) -> Iterator[str]:
    """What scaling means for this adapter, where it is not a plain LoRA."""
    from peft.utils import ModulesToSaveWrapper

    peft, model = session.config.peft, session.model
    whole = [path for path, layer in adapter_layers(model) if isinstance(layer, ModulesToSaveWrapper)]
    if peft.use_dora:
        yield "DoRA: the path is in the weights, W + scale (W' - W), with W' the adapted and W the base's weight"
    if peft.init == "pissa":
        yield "PiSSA: the change is against the original base, so scale 0 is the base and not its residual"
    if whole:
        yield f"trained whole, and scaled from the base's values to the trained ones: {', '.join(whole)}"
    ends = session.model.get_input_embeddings(), session.model.get_output_embeddings()
    if len(whole) > 1 and None not in ends and ends[0].weight is ends[1].weight:
        yield "embedding and head are one weight, which is scaled once"


class _KnobSweep:
    """Measures one session's model under changes of its adapter, all on the same rows."""

    def __init__(
        self, evaluator: ModelEvaluator, task: EvaluationRows, general: EvaluationRows, metric: str | None
    ) -> None:
        self._evaluator, self._task, self._general, self._metric = evaluator, task, general, metric
        self._scoring = evaluator.answer_scoring(task)
        self._states = BaseStates(), BaseStates()
        self.base: _Measured | None = None
        self.notes: list[str] = []

    def measure_scales(self, scales: Sequence[float]) -> Iterator[_Measured]:
        """The adapter at each scale; one whose losses are not finite is left out with a note, but for scale 1."""
        for scale in scales:
            try:
                with scaled_adapter(self._evaluator.session.model, scale):
                    yield self._measure(f"{scale:g}", scale, None)
            except BrokenAdapterError:
                if scale == 1:
                    raise
                self.notes.append(f"scale {scale:g} is left out: its losses are not finite")

    def measure_checkpoints(self, folders: dict[int, Path], adapter: Path) -> Iterator[_Measured]:
        """Each checkpoint's adapter as it was; the model then has the run's again."""
        model = self._evaluator.session.model
        for step, folder in folders.items():
            restore_adapter(model, folder)
            yield self._measure(f"step {step}", None, step)
        if folders:
            restore_adapter(model, adapter)

    def _measure(self, name: str, scale: float | None, step: int | None) -> _Measured:
        evaluator = self._evaluator
        base, task = evaluator.score_pair(self._task, f"scale {name}" if step is None else name, self._states[0])
        other_base, general = evaluator.score_pair(self._general, f"{name}, general text", self._states[1])
        self.base = self.base or _Measured("base", None, None, base, other_base, None)
        answers = None
        if self._metric:
            answers = evaluator.score_answers(self._task, task, self._scoring, name).scored
            if self._metric not in (known := answers.measure_all()):
                raise ConfigurationError(f"--metric {self._metric}: there are {', '.join(known)}.")
        return _Measured(name, scale, step, task, general, answers)


def summarize_points(
    base: _Measured, points: Sequence[_Measured], bootstrap: Bootstrap, metric: str | None
) -> Iterator[KnobPoint]:
    """The points with paired intervals: all are measured on the same resamples of the rows."""
    whole = next(i for i, point in enumerate(points, 1) if point.scale == 1)
    task, general = [base.task, *(p.task for p in points)], [base.general, *(p.general for p in points)]
    losses, draws = [m.measure_all()["loss"] for m in task], bootstrap.draw_measure(task, "loss")
    others, other_draws = [m.measure_all()["loss"] for m in general], bootstrap.draw_measure(general, "loss")
    gain = losses[0] - losses[whole]
    for i, point in enumerate(points, 1):
        kept = draws[:, 0] - draws[:, i], draws[:, 0] - draws[:, whole]
        with np.errstate(divide="ignore", invalid="ignore"):
            kept_interval = bootstrap.find_ends(kept[0] / kept[1]) if (kept[1] > 0).all() else None
        answers = point.answers
        yield KnobPoint(
            name=point.name,
            scale=point.scale,
            step=point.step,
            loss=losses[i],
            change=losses[i] - losses[0],
            change_interval=bootstrap.find_ends(draws[:, i] - draws[:, 0]),
            gain_kept=(losses[0] - losses[i]) / gain if gain > 0 else None,
            gain_kept_interval=kept_interval,
            kl=point.task.measure_all()["forward_kl"],
            kl_interval=bootstrap.measure_intervals(point.task).get("forward_kl"),
            general_loss=others[i],
            general_change=others[i] - others[0],
            general_change_interval=bootstrap.find_ends(other_draws[:, i] - other_draws[:, 0]),
            general_kl=point.general.measure_all()["forward_kl"],
            metric=answers.measure_all().get(metric) if answers and metric else None,
            metric_interval=bootstrap.measure_intervals(answers).get(metric) if answers and metric else None,
        )


def find_optimum(points: Sequence[_Measured], bootstrap: Bootstrap) -> tuple[float | None, Interval | None]:
    """The scale of the lowest loss and its interval, from a parabola through the lowest point and its neighbours.

    None where the lowest point is the first or last, or a resample has no minimum.
    """
    scales = np.array([point.scale for point in points], float)
    losses = np.array([point.task.measure_all()["loss"] for point in points])
    lowest = int(losses.argmin())
    if not 0 < lowest < len(points) - 1:
        return None, None
    near = slice(lowest - 1, lowest + 2)
    best = float(quadratic_minimum(scales[near], losses[near]))
    draws = bootstrap.draw_measure([point.task for point in points[near]], "loss")
    return best, bootstrap.find_ends(quadratic_minimum(scales[near], draws))


def choose_point(points: Sequence[KnobPoint]) -> tuple[str | None, str]:
    """The scale that keeps 95 % of the gain at the least KL, and why it is offered or none is."""
    whole = next(point for point in points if point.scale == 1)
    ends = whole.change_interval
    if whole.gain_kept is None or ends is None or ends[1] >= 0:
        return None, "these rows do not show that the adapter as trained is better than its base"
    enough = [p for p in points if p.scale is not None and p.gain_kept is not None and p.gain_kept >= KEPT]
    best = min(enough, key=lambda point: point.kl)
    if best.scale == 1:
        return None, f"no smaller KL keeps {KEPT:.0%} of the gain: the adapter as trained is that point"
    return best.name, (
        f"scale {best.name} keeps {best.gain_kept:.1%} of the gain with {best.kl / whole.kl:.0%} of the KL to the base"
    )
