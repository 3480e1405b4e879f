"""Modules that are left out of the adapter and would gain from it."""

from __future__ import annotations

from typing import Any

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analysis.findings.interventions import Claim, decide_finding, read_interventions
from training_lens.core.recording import Recording
from training_lens.errors import CheckpointError
from training_lens.runs.run_folder import RunFolder

RULE = Rule(
    code="targets",
    signature="test runs that adapt every linear layer end at a lower held-out loss",
    threshold="the upper end of the 95% interval below 0, and a difference of at least 5% of the gain over the base",
    source="measured on this run's rows; adapting attention alone is worse than all layers at equal parameters (LoRA "
    "Without Regret, 2025)",
    action="adapt every linear layer: peft.target_modules=auto",
)
CLAIM = Claim(
    question="targets",
    change="widened",
    better="More modules would learn more",
    open="More modules may learn more",
    fine="The adapted modules are enough",
    action="adapt every linear layer: {setting}",
    trusts_short_gain=True,
    trusts_short_loss=False,
)


def check_target_modules(recording: Recording) -> Finding:
    """Whether more modules should be adapted. No curve tells; test runs do."""
    measured = read_interventions(recording.folder)
    targets = _read_targets(recording)
    if targets == "auto" or ("targets" in measured and not measured["targets"].changes):
        return RULE.report_fine("Every linear layer is adapted", f"{len(recording.modules)} modules")
    kinds = ", ".join(sorted({module.kind for module in recording.modules}))
    open_finding = RULE.report_inconclusive(
        "Other modules may learn more",
        f"{len(recording.modules)} modules are adapted: {kinds}",
        "a run with the same seed and length that adapts every linear layer",
    )
    return open_finding if targets is None else decide_finding(RULE, open_finding, measured, CLAIM)


def _read_targets(recording: Recording) -> Any:
    """`peft.target_modules` of a run of ours; None if another trainer made it."""
    run = RunFolder(recording.folder)
    try:
        return run.read_metadata("config.json")["peft"]["target_modules"] if run.metadata.is_dir() else None
    except (CheckpointError, KeyError, TypeError):
        return None
