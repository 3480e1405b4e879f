"""Facts of a run that every report and the end of training state, with the verdict on its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from training_lens.analysis.advice import OURS, translate_advice
from training_lens.analyzers.lora_analyzer import SOUND, certify_capture, read_residuals
from training_lens.analyzers.module_groups import energy_shares, finite_points, latest_values, read_evolution
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series
from training_lens.evaluation.training_verdict import (
    TrainingRecord,
    assess_training,
    build_training_record,
    read_comparison_verdict,
)
from training_lens.evaluation.verdict import Verdict
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import format_seconds
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
LEAST_GAIN = 0.01  # of the base's loss: a smaller gain is hardly learning
MATTERS: Mapping[str, tuple[str, str]] = {  # table -> its content, and what is unknown without it
    tables.GRADIENTS: ("gradients", "no self-check of the capture and no gradients by layer"),
    tables.WEIGHTS: ("the adapter's weights", "the change of each layer is unknown"),
    tables.BASE: ("the base's weights", "changes cannot be compared with the weights that they change"),
    tables.SPECTRA: ("spectra", "the number of directions that the adapter uses is unknown"),
    tables.OPTIMIZER: ("the optimizer's state", "unknown whether a spike comes from the optimizer or from data"),
    tables.ACTIVATIONS: ("layers' outputs", "the drift of hidden states is unknown (no probe set?)"),
    tables.DIVERGENCE: ("the divergence from the base", "unknown whether the model forgets (no probe set?)"),
    tables.LOSS: ("the training loss", "unknown whether the model learned"),
    tables.EVALUATION: ("validation", "unknown whether the model learned for held-out rows"),
}


@dataclass(frozen=True)
class Certificate:
    """The capture's self-check: the largest residual of B^T dB = dA A^T, which is 0 up to rounding in a sound capture.

    `largest` is None if gradients were not captured; `checked` counts the residuals, one per module and step.
    """

    largest: float | None
    module: str | None
    step: int | None
    checked: int

    @property
    def is_sound(self) -> bool | None:
        """None if gradients were not captured."""
        return None if self.largest is None else self.largest <= SOUND

    def as_sentence(self) -> str:
        """The result with the largest error, its module and step, and the limit."""
        if self.largest is None:
            return "There is no self-check: gradients were not captured."
        verdict = "The capture is sound" if self.is_sound else "The capture is not what the optimizer saw"
        return (
            f"{verdict}, by an equation that exact gradients satisfy (BᵀdB = dA Aᵀ). The largest error of "
            f"{self.checked:,} checks is {self.largest:.2g} ({self.module}, step {self.step}; the limit is "
            f"{SOUND:g})."
        )

    def as_phrase(self) -> str:
        """The same as one phrase."""
        if self.largest is None:
            return "no self-check"
        return f"{'sound' if self.is_sound else 'NOT SOUND'} (largest self-check error {self.largest:.1g})"


def read_certificate(recording: Recording) -> Certificate:
    """The largest `self_check` with its module and step, of modules of which both factors train."""
    return Certificate(**certify_capture(read_residuals(recording)))


def list_captured(recording: Recording) -> list[tuple[str, str, int, int, int]]:
    """Table, data type, number of steps, last step and rows per step of each table with rows."""
    found = []
    for name in recording.captures.tables():
        rows = recording.captures.table(name, ["step"])
        steps = np.unique(rows.column("step").to_numpy())
        if len(steps):
            kind = str(recording.manifest.tables.get(name, "-"))
            found.append((name, kind, len(steps), int(steps[-1]), round(rows.num_rows / len(steps))))
    return found


def list_missing(recording: Recording) -> list[str]:
    """What was not captured, and why it matters."""
    there = set(recording.captures.tables())
    return [f"{what}: {why}" for table, (what, why) in MATTERS.items() if table not in there]


def cost_sentence(recording: Recording) -> str:
    """The seconds of the lens, and their share of the training time if known."""
    took = cost_brief(recording)
    return f"The capture took {took}." if took else "The cost of the capture was not recorded."


def cost_brief(recording: Recording) -> str:
    """The same as a phrase; empty if it was not recorded."""
    seconds = sum(recording.captures.cost().values())
    training = float(np.nansum(recording.series(tables.LOSS, "seconds").values))
    share = f", {seconds / training:.1%} of the training time of {format_seconds(training)}" if training else ""
    return f"{format_seconds(seconds)}{share}" if seconds else ""


@dataclass(frozen=True)
class LossSummary:
    """Losses in nats per supervised token; None if not captured.

    `first` and `last` are training losses, medians of a twentieth of the run; `broken_step` is the first step with a
    non-finite training loss; the others are validation losses.
    """

    first: float | None
    last: float | None
    base: float | None
    best: float | None
    best_step: int | None
    final: float | None
    broken_step: int | None

    def as_sentence(self, origin: str = OURS) -> str:
        """Whether it learned, by the validation loss if there is one, else by the training loss.

        Args:
            origin: that of `LensManifest`, for advice in the words of the loop that trained.
        """
        broken = f" From step {self.broken_step} on, the training loss is not finite." if self.broken_step else ""
        return translate_advice(self._describe_validation() or self._describe_training(), origin) + broken

    def _describe_validation(self) -> str:
        """Empty without validation."""
        if self.best is None:
            return ""
        end = f", and {self.final:.4f} at the end" if self.final != self.best else ""
        best = f"{self.best:.4f} at best (step {self.best_step}){end}, in nats per supervised token."
        if self.base is None:
            unknown = "What it was before training was not captured."
            return f"The validation loss is {best} {unknown} {self._describe_training()}"
        gain = self.base - self.best
        answer = "No" if gain <= 0 else "Hardly" if gain < LEAST_GAIN * self.base else "Yes"
        return f"{answer}: the validation loss was {self.base:.4f} before and is {best}"

    def _describe_training(self) -> str:
        if self.first is None or self.last is None:
            return "The training loss was not captured."
        fell = "fell" if self.last < self.first else "did not fall"
        change = f"The training loss {fell}, from {self.first:.4f} to {self.last:.4f} nats per supervised token."
        unknown = "Without validation rows, the loss on other rows is unknown (data.validation)."
        return change if self.best is not None else f"{change} {unknown}"


def read_losses(recording: Recording) -> LossSummary:
    """The training and validation losses of a run, and the base's."""
    every, training = recording.series(tables.LOSS, "loss"), finite_points(recording, tables.LOSS, "loss")[1]
    broken = every.steps[~np.isfinite(every.values).all(1)].tolist()
    part = max(1, len(training) // 20)
    validations = list(zip(*(a.tolist() for a in finite_points(recording, tables.EVALUATION, "loss")), strict=True))
    best_step, best = min(validations, key=lambda point: point[1], default=(None, None))
    base = finite_points(recording, tables.EVALUATION, "base_loss")[1].tolist()
    return LossSummary(
        first=float(np.median(training[:part])) if len(training) else None,
        last=float(np.median(training[-part:])) if len(training) else None,
        base=base[0] if base else None,
        best=best,
        best_step=best_step,
        final=validations[-1][1] if validations else None,
        broken_step=broken[0] if broken else None,
    )


@dataclass(frozen=True)
class WeightChanges:
    """The largest shares of |dW|^2 by layer and module type after `step`, and the largest change relative to W.

    Empty or None if unknown. `is_last` means that no later step has non-finite values.
    """

    step: int
    is_last: bool
    by_layer: Mapping[str, float]
    by_kind: Mapping[str, float]
    strongest: str | None
    strength: float | None

    def as_sentence(self) -> str:
        """Which layers and module types carry the update, and how large it is."""
        if not self.by_layer:
            return "Unknown: the adapter's weights were not captured, are 0, or are not finite."
        size = (
            f" The largest change is {self.format_strength()} its weight ({self.strongest})." if self.strongest else ""
        )
        after = "" if self.is_last else f" This is after step {self.step}: later weights are not finite."
        carriers = f"Layers {_format_shares(self.by_layer)} and modules {_format_shares(self.by_kind)}"
        return f"{carriers} carry most of the change (shares of |dW|²; dW is the update of a weight).{size}{after}"

    def as_phrase(self) -> str:
        """The same as one phrase."""
        if not self.by_layer:
            return "unknown: the adapter's weights were not captured, are 0, or are not finite"
        carriers = f"most in layers {_format_shares(self.by_layer)} and modules {_format_shares(self.by_kind)}"
        size = f"; at most {self.format_strength()} a weight" if self.strongest else ""
        return f"{carriers}{size}{'' if self.is_last else f' (at step {self.step})'}"

    def format_strength(self) -> str:
        """The largest change relative to its weight: '12% of', '3.1 times'."""
        ratio = self.strength or 0.0
        return f"{100 * ratio:.2g}% of" if ratio < 0.995 else f"{ratio:,.1f} times"


def read_changes(recording: Recording) -> WeightChanges:
    """What the adapter changed, at the last step with only finite values."""
    norms, strengths = recording.series(tables.WEIGHTS, "norm_update"), read_evolution(recording, "strength")
    known = np.flatnonzero(np.isfinite(norms.values).all(1))
    last = int(known[-1]) if len(known) else -1
    by_layer, by_kind = (_largest_values(energy_shares(norms, recording.modules, by), last) for by in ("layer", "kind"))
    most, strength = next(iter(_largest_values(strengths, last).items()), (None, None))
    step = int(norms.steps[last]) if len(known) else 0
    return WeightChanges(step, last == len(norms.steps) - 1, by_layer, by_kind, most, strength)


def _largest_values(series: Series, place: int) -> dict[str, float]:
    """The three largest values at a step, the largest first."""
    values = latest_values(Series(series.steps[: place + 1], series.names, series.values[: place + 1]))
    known = {name: value for name, value in values.items() if value is not None}
    return dict(sorted(known.items(), key=lambda item: -item[1])[:3])


def _format_shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} ({share:.0%})" for name, share in shares.items())


def find_verdict(recording: Recording) -> Verdict | None:
    """The verdict of `compare` unless the run was trained further, else of its validation; None without losses."""
    run = RunFolder(recording.folder)
    if (compared := read_comparison_verdict(run)) is not None:
        return compared
    record = _training_record(recording)
    if record is None:
        return None
    verdict = assess_training(record, str(run.root) if run.metadata.is_dir() else "")
    return replace(verdict, decide=translate_advice(verdict.decide, recording.manifest.origin))


def _training_record(recording: Recording) -> TrainingRecord | None:
    trained, validated = (recording.series(table, "loss") for table in (tables.LOSS, tables.EVALUATION))
    if not trained.steps.size and not validated.steps.size:
        return None
    losses, base = (
        finite_points(recording, table, measure)[1].tolist()
        for table, measure in ((tables.LOSS, "loss"), (tables.EVALUATION, "base_loss"))
    )
    points = zip(*finite_points(recording, tables.EVALUATION, "loss"), strict=True)
    validations = [(float(step), float(loss)) for step, loss in points if step > 0]
    return build_training_record(trained.steps.tolist(), losses, base[0] if base else None, validations)
