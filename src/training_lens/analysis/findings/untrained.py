"""Modules whose adapter does not move."""

from __future__ import annotations

import numpy as np

from training_lens.analysis.findings.evidence import list_names, read_curve, read_gradient_norms
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series

FIRST_STEPS = 2  # B is 0 before step 1, and a warm-up may begin at a rate of 0
RULE = Rule(
    code="untrained",
    signature="the change dW of a module is the same after every step: its steps are 0, or A and B keep their norms",
    threshold=f"exactly 0 at every captured step, of which the last is after step {FIRST_STEPS}",
    source="exact: any update of A or B that changes what the adapter computes moves dW (trl#3926, transformers#23990)",
    action="stop the run; see that the adapter is active and its parameters require gradients (print_trainable_"
    "parameters), and that the optimizer was given them",
)


def check_untrained(recording: Recording) -> Finding:
    """Whether every module's adapter moves. Holds for LoRA, DoRA and PiSSA, whose B is never 0."""
    moved, last = _find_moving_modules(recording)
    if last <= FIRST_STEPS or not moved:
        return RULE.report_inconclusive(
            "Whether the adapter trains is not known",
            f"norms of the adapter's weights to step {last}",
            f"captures of the table {tables.WEIGHTS} beyond step {FIRST_STEPS}, or two checkpoints",
        )
    still = [name for name, moves in moved.items() if not moves]
    measured = f"{len(still)} of {len(moved)} modules never move, to step {last}"
    evidence = {"modules": still, "watched": len(moved), "last_step": last}
    if not still:
        return RULE.report_fine(
            "Every module trains", f"all {len(moved)} modules move, to step {last}", evidence=evidence
        )
    all_still = len(still) == len(moved)
    return RULE.report_symptom(
        "problem" if all_still else "warning",
        "Nothing trains" if all_still else f"{len(still)} of {len(moved)} modules do not train",
        measured,
        where=list_names(still),
        confidence="sure",
        action=_choose_action(recording, still),
        evidence=evidence,
    )


def _find_moving_modules(recording: Recording) -> tuple[dict[str, bool], int]:
    """Whether each module has moved, those left out of which it is not known; and the last step of which it is."""
    steps = recording.series(tables.WEIGHTS, "norm_step")
    known = np.isfinite(steps.values) & (steps.steps[:, None] > 0)
    if known.any():
        moves, last = (known & (steps.values != 0)).any(0), int(steps.steps[known.any(1)].max())
        return {name: bool(moves[i]) for i, name in enumerate(steps.names) if known[:, i].any()}, last
    return _compare_norms(*(recording.series(tables.WEIGHTS, measure) for measure in ("norm_a", "norm_b")))


def _compare_norms(norm_a: Series, norm_b: Series) -> tuple[dict[str, bool], int]:
    """Of captures without steps: whether a norm changes between them; of one capture alone, whether B is not 0."""
    moved = {}
    for i, name in enumerate(norm_b.names):
        values = norm_b.values[:, i][np.isfinite(norm_b.values[:, i])]
        of_a = norm_a.column(name) if name in norm_a.names else values
        if len(values):
            changes = any(len(np.unique(norms[np.isfinite(norms)])) > 1 for norms in (values, of_a))
            moved[name] = changes or (len(norm_b.steps) == 1 and bool(values[0] != 0))
    return moved, int(norm_b.steps[-1]) if moved else 0


def _choose_action(recording: Recording, still: list[str]) -> str:
    """What the gradients of the modules that stand still tell of the cause."""
    gradients = read_gradient_norms(recording)
    reached = [name for name in still if name in gradients.names and (np.nan_to_num(gradients.column(name)) > 0).any()]
    rates = read_curve(recording, tables.LOSS, "lr")[1]
    if len(rates) and not rates.any():
        return "the learning rate is 0 at every step: set training.lr, or mend the schedule"
    if reached:
        return (
            "their gradients are not 0, so the optimizer does not step them: see that it was given their parameters, "
            "and that weights in bfloat16 do not round the updates away (keep the adapter in float32)"
        )
    if gradients.names:
        return (
            "no gradient reaches them: see that their parameters require gradients, that the adapter is active, and "
            "that the model uses these modules. Leave them out of peft.target_modules if that is meant"
        )
    return RULE.action
