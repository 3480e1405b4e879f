"""Modules whose adapter does not train."""

from __future__ import annotations

import numpy as np

from training_lens.analysis.findings.evidence import list_names, read_curve
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analyzers.module_groups import gradient_norms
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series

STOPPED, LEAST_STOPPED = 0.1, 5  # share of the run and number of steps without a change
FIRST_STEPS = 2  # B is 0 before step 1, and a warm-up may start at a rate of 0
RULE = Rule(
    code="untrained",
    signature="the change dW of a module is the same after every step: its steps are 0, or A and B keep their norms",
    threshold=f"exactly 0 at every captured step, the last of them after step {FIRST_STEPS}; or in the last "
    f"{STOPPED:.0%} of the run",
    source="exact: any effective update of A or B changes dW (trl#3926, transformers#23990)",
    action="stop the run; check that the adapter is active, that its parameters require gradients "
    "(print_trainable_parameters), and that the optimizer has them",
)


def check_untrained(recording: Recording) -> Finding:
    """Whether every module's adapter changes. Holds for LoRA, DoRA and PiSSA, whose B is never 0."""
    changed, last = _find_moving_modules(recording)
    if last <= FIRST_STEPS or not changed:
        return RULE.report_inconclusive(
            "Not enough data on whether the adapter trains",
            f"norms of the adapter's weights up to step {last}",
            f"captures of the table {tables.WEIGHTS} after step {FIRST_STEPS}, or two checkpoints",
        )
    still = [name for name, changes in changed.items() if not changes]
    measured = f"{len(still)} of {len(changed)} modules do not change up to step {last}"
    evidence = {"modules": still, "watched": len(changed), "last_step": last}
    stopped = None if still else _find_stop(recording)
    if stopped is not None:
        return _report_stop(recording, stopped, last)
    if not still:
        return RULE.report_fine(
            "Every module trains", f"all {len(changed)} modules change, up to step {last}", evidence=evidence
        )
    all_still = len(still) == len(changed)
    return RULE.report_symptom(
        "problem" if all_still else "warning",
        "Nothing trains" if all_still else f"{len(still)} of {len(changed)} modules do not train",
        measured,
        where=list_names(still),
        confidence="sure",
        action=_choose_action(recording, still),
        evidence=evidence,
    )


def _find_moving_modules(recording: Recording) -> tuple[dict[str, bool], int]:
    """Whether each module has changed, without those for which that is unknown; and the last known step."""
    steps = recording.series(tables.WEIGHTS, "norm_step")
    known = np.isfinite(steps.values) & (steps.steps[:, None] > 0)
    if known.any():
        changes, last = (known & (steps.values != 0)).any(0), int(steps.steps[known.any(1)].max())
        return {name: bool(changes[i]) for i, name in enumerate(steps.names) if known[:, i].any()}, last
    return _compare_norms(*(recording.series(tables.WEIGHTS, measure) for measure in ("norm_a", "norm_b")))


def _find_stop(recording: Recording) -> int | None:
    """The last step at which any module changed, if the run went on for a tenth of its steps without a change."""
    steps = recording.series(tables.WEIGHTS, "norm_step")
    known = np.isfinite(steps.values).all(1) & (steps.steps > 0)
    at, moved = steps.steps[known], (steps.values[known] != 0).any(1)
    if not moved.any():
        return None
    last = int(at[moved][-1])
    return last if at[-1] - last >= max(LEAST_STOPPED, STOPPED * at[-1]) else None


def _report_stop(recording: Recording, stopped: int, last: int) -> Finding:
    steps, rates = read_curve(recording, tables.LOSS, "lr")
    is_rate = bool((steps > stopped).any()) and not rates[steps > stopped].any()
    return RULE.report_symptom(
        "warning",
        f"Nothing changes after step {stopped}",
        f"every module changes up to step {stopped}, and none from then to step {last}"
        + ("; the learning rate is 0 there" if is_rate else ""),
        where=f"from step {stopped + 1}",
        confidence="sure",
        action="check that the schedule is as long as the run, and advances once an update, not once a batch"
        if is_rate
        else RULE.action,
        evidence={"step": stopped, "last_step": last},
    )


def _compare_norms(norm_a: Series, norm_b: Series) -> tuple[dict[str, bool], int]:
    """For captures without step norms: whether a norm differs between them; for a single one, whether B is not 0."""
    changed = {}
    for i, name in enumerate(norm_b.names):
        values = norm_b.values[:, i][np.isfinite(norm_b.values[:, i])]
        of_a = norm_a.column(name) if name in norm_a.names else values
        if len(values):
            changes = any(len(np.unique(norms[np.isfinite(norms)])) > 1 for norms in (values, of_a))
            changed[name] = changes or (len(norm_b.steps) == 1 and bool(values[0] != 0))
    return changed, int(norm_b.steps[-1]) if changed else 0


def _choose_action(recording: Recording, still: list[str]) -> str:
    """The action that fits the gradients of the untrained modules."""
    gradients = gradient_norms(recording)
    reached = [name for name in still if name in gradients.names and (np.nan_to_num(gradients.column(name)) > 0).any()]
    rates = read_curve(recording, tables.LOSS, "lr")[1]
    if len(rates) and not rates.any():
        return "the learning rate is 0 at every step: set training.lr, or fix the schedule"
    if not reached and (cause := _find_missing_gradient(recording, still)):
        return cause
    if reached:
        return (
            "their gradients are not 0, so the optimizer does not step them: check that it has their parameters, and "
            "that bfloat16 weights do not round the updates away (keep the adapter in float32)"
        )
    if gradients.names:
        return (
            "no gradient reaches them: check that their parameters require gradients, that the adapter is active, and "
            "that the model uses these modules. If that is intended, leave them out of peft.target_modules"
        )
    return RULE.action


def _find_missing_gradient(recording: Recording, still: list[str]) -> str:
    """Why no module at all gets a gradient; empty where that is not known."""
    if len(still) != len(recording.modules) or np.isnan(gradient_norms(recording).values).any():
        return ""
    losses = recording.series(tables.LOSS, "loss").values
    targets = recording.series(tables.LOSS, "supervised_tokens").values
    is_masked = targets.size and not targets.any()
    if is_masked or (losses.size and not np.nan_to_num(losses).any()):
        return (
            "no token is supervised: let the answers be supervised, as every label is masked (-100), and the loss is 0 "
            "or undefined"
        )
    frozen = recording.settings.get("frozen") or ()
    if all(f"{name}.B" in frozen for name in still):
        return "let their B require gradients: it is frozen at 0, so A gets no gradient either, and dW = s B A stays 0"
    return ""
