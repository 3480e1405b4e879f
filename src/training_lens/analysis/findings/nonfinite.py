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
class _FirstNonfinite:
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
    def source_module(self) -> str:
        """Where it began: gradients go backward, so the last of their rows, and else the first."""
        return self.bad[-1 if self.table == tables.GRADIENTS else 0]

    @property
    def nearest_finite(self) -> str:
        """The clean row that is nearest to the culprit; empty where there is none."""
        place = self.rows.index(self.source_module)
        clean = [i for i, name in enumerate(self.rows) if name not in self.bad]
        return self.rows[min(clean, key=lambda i: abs(i - place))] if clean else ""


def check_nonfinite(recording: Recording) -> Finding:
    """Whether every number stayed finite; else the first that did not, and its clean neighbour."""
    looked = [each for each in LOOKED_AT if recording.has(*each[:2])]
    if not {tables.GRADIENTS, tables.WEIGHTS} & {table for table, _, _ in looked}:
        return RULE.report_inconclusive(
            "Whether all numbers are finite is not known",
            "no norms of gradients or weights were captured",
            f"captures of the tables {tables.GRADIENTS} and {tables.WEIGHTS}",
        )
    broken = [found for table, measure, what in looked if (found := _find_first(recording, table, measure, what))]
    if not broken:
        return RULE.report_fine(
            "All numbers are finite", f"every value of {', '.join(dict.fromkeys(t for t, _, _ in looked))}"
        )
    first = min(broken, key=lambda each: each.step)
    skipped = all(each.passed and each.table == tables.GRADIENTS for each in broken)
    return _report_skipped_steps(first) if skipped else _report_corruption(first)


def _find_first(recording: Recording, table: str, measure: str, what: str) -> _FirstNonfinite | None:
    rows = recording.captures.table(table, ["step", "module", measure])
    rows = rows.filter(rows.column(measure).is_valid())  # null is what was not captured
    bad = rows.filter(pc.invert(pc.is_finite(rows.column(measure))))
    if not bad.num_rows:
        return None
    step = pc.min(bad.column("step")).as_py()
    passed = pc.max(bad.column("step")).as_py() < pc.max(rows.column("step")).as_py()
    return _FirstNonfinite(step, table, what, _module_names(rows, step), _module_names(bad, step), passed)


def _module_names(rows: pa.Table, step: int) -> list[str]:
    names: list[str] = rows.filter(pc.equal(rows.column("step"), step)).column("module").to_pylist()
    return names


def _report_skipped_steps(first: _FirstNonfinite) -> Finding:
    return RULE.report_symptom(
        "note",
        "Single steps had gradients that are not finite",
        _describe_first(first) + "; later gradients are finite, and all weights",
        where=_describe_place(first),
        confidence="sure",
        action="nothing, if this is fp16: its loss scaling skips such steps",
        evidence=_collect_evidence(first),
    )


def _report_corruption(first: _FirstNonfinite) -> Finding:
    everywhere = first.table != tables.LOSS and not first.nearest_finite
    return RULE.report_symptom(
        "problem",
        "Not finite any more",
        _describe_first(first),
        where=_describe_place(first),
        confidence="sure",
        decide="where it began: every module broke at once, so a run with lens.scalars_every=1 and lens.probe_every=1"
        if everywhere
        else "",
        evidence=_collect_evidence(first),
    )


def _describe_first(first: _FirstNonfinite) -> str:
    if first.table == tables.LOSS:
        return f"first the loss, at step {first.step}"
    beside = f"the nearest clean one is {first.nearest_finite}" if first.nearest_finite else "none is clean"
    return (
        f"first {first.what} of {first.source_module}, at step {first.step}; {len(first.bad)} of {len(first.rows)} are "
        f"not finite there, {beside}"
    )


def _describe_place(first: _FirstNonfinite) -> str:
    return f"step {first.step}" if first.table == tables.LOSS else f"{first.source_module}, step {first.step}"


def _collect_evidence(first: _FirstNonfinite) -> dict[str, object]:
    return {
        "step": first.step,
        "table": first.table,
        "module": first.source_module,
        "clean_neighbour": first.nearest_finite,
        "modules": first.bad,
    }
