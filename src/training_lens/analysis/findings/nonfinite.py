"""The first number that is no longer finite, where it came up, and what beside it was still clean."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording

RULE = Rule(
    code="nonfinite",
    signature="a loss, gradient, weight or layer output that is NaN or infinite",
    threshold="any; the loss scaling of fp16 skips single steps with such gradients, and training goes on",
    source="exact: what is no number stays none in all that is computed from it",
    action="look at the named module and step: lower training.lr, compute in bf16 or fp32 in place of fp16, and see "
    "that this step's rows are whole",
)
LOOKED_AT = (  # in the order in which a step makes them
    (tables.LOSS, "loss", "the loss"),
    (tables.GRADIENTS, "norm_a", "the gradient of A"),
    (tables.GRADIENTS, "norm_b", "the gradient of B"),
    (tables.WEIGHTS, "norm_a", "A"),
    (tables.WEIGHTS, "norm_b", "B"),
    (tables.ACTIVATIONS, "rms", "the output"),
)


@dataclass(frozen=True)
class _Broken:
    """The first step at which a measure is not finite.

    `rows` are all modules captured then, in the model's order, and `bad` those that are not finite; `passed` tells
    that the measure is finite everywhere at the end again.
    """

    step: int
    table: str
    what: str
    rows: list[str]
    bad: list[str]
    passed: bool

    @property
    def culprit(self) -> str:
        """Where it began: gradients go backward, so the last of their rows, and else the first."""
        return self.bad[-1 if self.table == tables.GRADIENTS else 0]

    @property
    def neighbour(self) -> str:
        """The clean row that is nearest to the culprit; empty where there is none."""
        place = self.rows.index(self.culprit)
        clean = [i for i, name in enumerate(self.rows) if name not in self.bad]
        return self.rows[min(clean, key=lambda i: abs(i - place))] if clean else ""


def nonfinite(recording: Recording) -> Finding:
    """Whether every number stayed finite; else the first that did not, and its clean neighbour."""
    looked = [each for each in LOOKED_AT if recording.has(*each[:2])]
    if not {tables.GRADIENTS, tables.WEIGHTS} & {table for table, _, _ in looked}:
        return RULE.unknown(
            "Whether all numbers are finite is not known",
            "no norms of gradients or weights were captured",
            f"captures of the tables {tables.GRADIENTS} and {tables.WEIGHTS}",
        )
    broken = [found for table, measure, what in looked if (found := _first(recording, table, measure, what))]
    if not broken:
        return RULE.fine(
            "All numbers are finite", f"every value of {', '.join(dict.fromkeys(t for t, _, _ in looked))}"
        )
    first = min(broken, key=lambda each: each.step)
    skipped = all(each.passed and each.table == tables.GRADIENTS for each in broken)
    return _skipped_steps(first) if skipped else _spoilt(first)


def _first(recording: Recording, table: str, measure: str, what: str) -> _Broken | None:
    rows = recording.captures.table(table, ["step", "module", measure])
    rows = rows.filter(rows.column(measure).is_valid())  # null is what was not captured
    bad = rows.filter(pc.invert(pc.is_finite(rows.column(measure))))
    if not bad.num_rows:
        return None
    step = pc.min(bad.column("step")).as_py()
    passed = pc.max(bad.column("step")).as_py() < pc.max(rows.column("step")).as_py()
    return _Broken(step, table, what, _modules(rows, step), _modules(bad, step), passed)


def _modules(rows: pa.Table, step: int) -> list[str]:
    names: list[str] = rows.filter(pc.equal(rows.column("step"), step)).column("module").to_pylist()
    return names


def _skipped_steps(first: _Broken) -> Finding:
    return RULE.found(
        "note",
        "Single steps had gradients that are not finite",
        _measured(first) + "; later gradients are finite, and all weights",
        where=_where(first),
        confidence="sure",
        action="nothing, if this is fp16: its loss scaling skips such steps",
        evidence=_evidence(first),
    )


def _spoilt(first: _Broken) -> Finding:
    everywhere = first.table != tables.LOSS and not first.neighbour
    return RULE.found(
        "problem",
        "Not finite any more",
        _measured(first),
        where=_where(first),
        confidence="sure",
        decide="where it began: every module broke at once, so a run with lens.scalars_every=1 and lens.probe_every=1"
        if everywhere
        else "",
        evidence=_evidence(first),
    )


def _measured(first: _Broken) -> str:
    if first.table == tables.LOSS:
        return f"first the loss, at step {first.step}"
    beside = f"the nearest clean one is {first.neighbour}" if first.neighbour else "none is clean"
    return (
        f"first {first.what} of {first.culprit}, at step {first.step}; {len(first.bad)} of {len(first.rows)} are not "
        f"finite there, {beside}"
    )


def _where(first: _Broken) -> str:
    return f"step {first.step}" if first.table == tables.LOSS else f"{first.culprit}, step {first.step}"


def _evidence(first: _Broken) -> dict[str, object]:
    return {
        "step": first.step,
        "table": first.table,
        "module": first.culprit,
        "clean_neighbour": first.neighbour,
        "modules": first.bad,
    }
