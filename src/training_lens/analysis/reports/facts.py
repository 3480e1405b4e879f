"""What every report and the end of training say of a run, in plain words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from training_lens.analysis.evolution import energy_shares, evolution
from training_lens.analyzers.grouping import latest
from training_lens.analyzers.readings.gradients import certificate
from training_lens.core import tables
from training_lens.core.recording import Recording
from training_lens.utils.formatting import format_seconds

# float32 rounds by 1e-7 and bfloat16 by 0.2 % at most, whatever the size: a few such roundings stay below this
SOUND = 0.01
MATTERS: Mapping[str, tuple[str, str]] = {  # table -> what is not known without it, and how to capture it
    tables.GRADIENTS: ("gradients", "no certificate of the capture, and no gradient of a single layer, is known"),
    tables.WEIGHTS: ("the adapter's weights", "how far each layer moves is not known"),
    tables.BASE: ("the base's weights", "changes cannot be set against the weights that they change"),
    tables.SPECTRA: ("spectra", "how many directions the adapter uses is not known"),
    tables.OPTIMIZER: ("the optimizer's state", "whether a spike comes from the optimizer or from data is not known"),
    tables.ACTIVATIONS: ("layers' outputs", "the drift of hidden states is not known (no probe set?)"),
    tables.DIVERGENCE: ("the divergence from the base", "whether the model forgets is not known (no probe set?)"),
    tables.LOSS: ("the training loss", "whether it learned is not known"),
    tables.EVALUATION: ("validation", "whether it learned for rows that it was not trained on is not known"),
}


@dataclass(frozen=True)
class Certificate:
    """The capture's own proof: the largest residual of B^T dB = dA A^T, which is 0 up to rounding in a sound capture.

    `largest` is None where gradients were not captured; `checked` counts the residuals, one a module and step.
    """

    largest: float | None
    module: str | None
    step: int | None
    checked: int

    @property
    def sound(self) -> bool | None:
        """None where nothing tells."""
        return None if self.largest is None else self.largest <= SOUND

    def sentence(self) -> str:
        """What it says, with its number, where it was, and its limit."""
        if self.largest is None:
            return "There is no certificate: gradients were not captured."
        verdict = "The capture is sound" if self.sound else "The capture is not what the optimizer saw"
        return (
            f"{verdict}: the largest of {self.checked:,} residuals of its own check, which are 0 up to rounding, is "
            f"{self.largest:.2g} ({self.module}, step {self.step}; sound is up to {SOUND:g})."
        )


def certificate_of(recording: Recording) -> Certificate:
    """The largest `self_check` with its module and step."""
    return Certificate(**certificate(recording.series(tables.GRADIENTS, "self_check")))


def captured(recording: Recording) -> list[tuple[str, str, int, int, int]]:
    """Table, data type, number of steps, last step, number of rows a step, of each table that has rows."""
    found = []
    for name in recording.captures.tables():
        rows = recording.captures.table(name, ["step"])
        steps = np.unique(rows.column("step").to_numpy())
        if len(steps):
            kind = str(recording.manifest.tables.get(name, "-"))
            found.append((name, kind, len(steps), int(steps[-1]), round(rows.num_rows / len(steps))))
    return found


def missing(recording: Recording) -> list[str]:
    """What was not captured, and why that matters."""
    there = set(recording.captures.tables())
    return [f"{what}: {why}" for table, (what, why) in MATTERS.items() if table not in there]


def cost_sentence(recording: Recording) -> str:
    """The lens's own seconds, and their share of the training time where that is known."""
    seconds = sum(recording.captures.cost().values())
    training = float(np.nansum(recording.series(tables.LOSS, "seconds").values))
    if not seconds:
        return "What the capture cost was not kept."
    share = f", {seconds / training:.1%} of the training time of {format_seconds(training)}" if training else ""
    return f"The capture itself took {format_seconds(seconds)}{share}."


@dataclass(frozen=True)
class Losses:
    """Nats per supervised token; None what was not captured.

    `first` and `last` are of training, medians of a twentieth of the run; the others are of validation.
    """

    first: float | None
    last: float | None
    base: float | None
    best: float | None
    best_step: int | None
    final: float | None

    def sentence(self) -> str:
        """Whether it learned, by validation where there was one, else by the training loss."""
        if self.best is not None and self.base is not None:
            gain = self.base - self.best
            end = f", and {self.final:.4f} at the end" if self.final != self.best else ""
            verb = "Yes" if gain > 0 else "No"
            return (
                f"{verb}: the validation loss was {self.base:.4f} before, is {self.best:.4f} at best (step "
                f"{self.best_step}){end}, in nats per supervised token."
            )
        if self.first is None or self.last is None:
            return "Nobody can tell: no loss was captured."
        fell = "fell" if self.last < self.first else "did not fall"
        return (
            f"The training loss {fell}, from {self.first:.4f} to {self.last:.4f} nats per supervised token. Without "
            "validation rows, nobody can tell how it does on others (data.validation)."
        )


def losses(recording: Recording) -> Losses:
    """Of training, of validation, and of the base."""
    training = _finite(recording, tables.LOSS, "loss")[1]
    part = max(1, len(training) // 20)
    steps, judged = _finite(recording, tables.EVALUATION, "loss")
    base = _finite(recording, tables.EVALUATION, "base_loss")[1]
    best = int(judged.argmin()) if len(judged) else None
    return Losses(
        first=float(np.median(training[:part])) if len(training) else None,
        last=float(np.median(training[-part:])) if len(training) else None,
        base=float(base[0]) if len(base) else None,
        best=None if best is None else float(judged[best]),
        best_step=None if best is None else int(steps[best]),
        final=float(judged[-1]) if len(judged) else None,
    )


def _finite(recording: Recording, table: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
    series = recording.series(table, measure)
    values = series.values.ravel()
    kept = np.isfinite(values)
    return series.steps[kept], values[kept]


def changed_sentence(recording: Recording) -> str:
    """Which layers and kinds of modules carry the update, and how large it is."""
    norms = recording.series(tables.WEIGHTS, "norm_update")
    by_layer, by_kind = (_largest(latest(energy_shares(norms, recording.modules, by))) for by in ("layer", "kind"))
    if not by_layer:
        return "Nobody can tell: the adapter's weights were not captured, or are 0."
    strength = {k: v for k, v in latest(evolution(recording, "strength")).items() if v is not None}
    most = max(strength, key=strength.__getitem__) if strength else None
    size = f" The largest change is {_part(strength[most])} its weight ({most})." if most else ""
    return f"Layers {_shares(by_layer)} and modules {_shares(by_kind)} carry the most of |dW|².{size}"


def _part(ratio: float) -> str:
    return f"{ratio:.2%} of" if ratio < 10 else f"{ratio:,.0f} times"


def _largest(shares: Mapping[str, float | None]) -> dict[str, float]:
    known = {name: share for name, share in shares.items() if share is not None}
    return dict(sorted(known.items(), key=lambda item: -item[1])[:3])


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} ({share:.0%})" for name, share in shares.items())
