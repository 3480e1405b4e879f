"""The first non-finite value, where it appeared, and the nearest module that was still finite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from training_lens.analysis.findings.finding import Finding, FindingDetails, Rule
from training_lens.analyzers.module_groups import gradient_norms
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording

RULE = Rule(
    code="nonfinite",
    signature="a loss, gradient, weight or layer output that is NaN or infinite",
    threshold="any; fp16 loss scaling skips single steps with such gradients, and training continues",
    source="exact: everything computed from a non-finite value is non-finite",
    action="check the named module and step: lower training.lr, use bf16 or fp32 instead of fp16, and check the rows "
    "of this step",
)
LOOKED_AT = (  # in the order in which a run computes them
    (tables.BASE, "norm", "the frozen weight"),
    (tables.EVALUATION, "base_loss", "the base's validation loss"),
    (tables.LOSS, "loss", "the loss"),
    (tables.GRADIENTS, "norm_a", "the gradient of A"),
    (tables.GRADIENTS, "norm_b", "the gradient of B"),
    (tables.WEIGHTS, "norm_a", "A"),
    (tables.WEIGHTS, "norm_b", "B"),
    (tables.ACTIVATIONS, "rms", "the output"),
    (tables.EVALUATION, "loss", "the validation loss"),
)
OF_THE_RUN = (tables.LOSS, tables.EVALUATION)


@dataclass(frozen=True)
class _FirstNonfinite:
    """The first step at which a measure is not finite.

    `rows` are all modules captured at that step, in model order, and `bad` the non-finite ones; `recovered` means that
    the measure is finite everywhere at the end.
    """

    step: int
    table: str
    what: str
    rows: list[str]
    bad: list[str]
    recovered: bool

    @property
    def source_module(self) -> str:
        """The module where it began: the last non-finite one for gradients, which flow backward, else the first."""
        return self.bad[-1 if self.table == tables.GRADIENTS else 0]

    @property
    def nearest_finite(self) -> str:
        """The finite module nearest to the source; empty if there is none."""
        place = self.rows.index(self.source_module)
        finite = [i for i, name in enumerate(self.rows) if name not in self.bad]
        return self.rows[min(finite, key=lambda i: abs(i - place))] if finite else ""

    def describe(self) -> str:
        """What was not finite first, where and when."""
        if self.table in OF_THE_RUN:
            return f"first {self.what}, at step {self.step}"
        nearest = f"the nearest finite one is {self.nearest_finite}" if self.nearest_finite else "none is finite"
        return (
            f"first {self.what} of {self.source_module}, at step {self.step}; {len(self.bad)} of {len(self.rows)} are "
            f"not finite there, {nearest}"
        )


def check_nonfinite(recording: Recording) -> Finding:
    """Whether every value stayed finite; else the first that did not, and the nearest finite module."""
    looked = [each for each in LOOKED_AT if recording.has(*each[:2])]
    broken = [found for table, measure, what in looked if (found := _find_first(recording, table, measure, what))]
    if not broken and not {tables.GRADIENTS, tables.WEIGHTS} & {table for table, _, _ in looked}:
        return RULE.report_inconclusive(
            "Not enough data on non-finite values",
            "no norms of gradients or weights were captured",
            f"captures of the tables {tables.GRADIENTS} and {tables.WEIGHTS}",
        )
    if not broken:
        return RULE.report_fine(
            "All values are finite", f"every value of {', '.join(dict.fromkeys(t for t, _, _ in looked))}"
        )
    first = min(broken, key=lambda each: each.step)
    details: FindingDetails = {
        "where": f"step {first.step}" if first.table in OF_THE_RUN else f"{first.source_module}, step {first.step}",
        "confidence": "sure",
        "evidence": {
            "step": first.step,
            "table": first.table,
            "module": first.source_module,
            "clean_neighbour": first.nearest_finite,
            "modules": first.bad,
        },
    }
    if all(each.recovered and each.table == tables.GRADIENTS for each in broken):
        measured = first.describe() + "; later gradients and all weights are finite"
        details["action"] = "nothing with fp16: its loss scaling skips such steps"
        return RULE.report_symptom("note", "Single steps had non-finite gradients", measured, **details)
    if cause := _find_other_cause(recording, first):
        title, details["action"] = cause
        return RULE.report_symptom("problem", title, first.describe(), **details)
    if first.table not in OF_THE_RUN and not first.nearest_finite:
        details["decide"] = (
            "where it began: all modules broke at once, so train with lens.scalars_every=1 and lens.probe_every=1"
        )
    return RULE.report_symptom("problem", "Non-finite values", first.describe(), **details)


def _find_other_cause(recording: Recording, first: _FirstNonfinite) -> tuple[str, str] | None:
    """Title and action where the rate cannot be the cause: what broke was there before any update."""
    if first.step == 0 or first.table == tables.BASE:
        return (
            "The base model is not finite",
            "neither the rows nor the rate are the cause, as nothing was trained yet: check the base's files, load it "
            "again, and use bf16 or fp32 instead of fp16",
        )
    if first.table == tables.LOSS and not _has_targets(recording, first.step):
        return (
            "No token is supervised",
            "let the answers be supervised: every label of this step is masked (-100), so it has no loss",
        )
    if first.step == 1 and first.table in (tables.LOSS, tables.GRADIENTS):
        return (
            "Non-finite values before the first update",
            "the rate is not the cause, as no update was made yet: check the rows of this step, the base, and its "
            "dtype (bf16 or fp32 instead of fp16)",
        )
    return None


def _has_targets(recording: Recording, step: int) -> bool:
    """Whether the step has supervised tokens: by their number, or by a gradient that is not exactly 0."""
    counts, norms = recording.series(tables.LOSS, "supervised_tokens"), gradient_norms(recording)
    known = counts.values[counts.steps == step]
    if known.size and np.isfinite(known).all():
        return bool(known.all())
    gradients = norms.values[norms.steps == step]
    return bool(not gradients.size or (gradients != 0).any())


def _find_first(recording: Recording, table: str, measure: str, what: str) -> _FirstNonfinite | None:
    rows = recording.captures.table(table, ["step", "module", measure])
    rows = rows.filter(rows.column(measure).is_valid())  # null means not captured
    bad = rows.filter(pc.invert(pc.is_finite(rows.column(measure))))
    if not bad.num_rows:
        return None
    step = pc.min(bad.column("step")).as_py()
    recovered = pc.max(bad.column("step")).as_py() < pc.max(rows.column("step")).as_py()
    names, bad_names = (
        each.filter(pc.equal(each.column("step"), step)).column("module").to_pylist() for each in (rows, bad)
    )
    return _FirstNonfinite(step, table, what, names, bad_names, recovered)
