"""Checks of the loaded base and of the first two updates: stops a run that cannot learn, with the cause."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.errors import TrainingError
from training_lens.evaluation.evaluator import LossReport
from training_lens.models.broken_weights import describe_broken_weights, describe_zero_weights
from training_lens.models.experts import adapted_path
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback, StepReport
from training_lens.training.plan import RunPlan
from training_lens.training.preflight.check_plan import log_findings, sort_findings, write_findings
from training_lens.training.preflight.expert_check import ExpertCheck
from training_lens.training.preflight.split_checks import UNLIKE
from training_lens.utils.formatting import list_names
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
UPDATES = 2  # A gets its first gradient in the second one, as B is 0 before the first
NEAR_CHANCE, SPREAD, UNSURE = 0.02, 0.05, 0.9  # of ln(vocabulary)
UNLIKE_SIGMAS, UNLIKE_SHARE = 6.0, 0.25
FROZEN = "requires_grad is off"
NEW_ROWS = ".token_adapter.trainable_tokens_delta."  # in names of parameters: rows of new tokens
SHOWN = 6  # modules that an error names

BASE = Rule(
    code="base_model",
    signature="the base's loss is that of guessing among all tokens, for every row alike",
    threshold=f"within {NEAR_CHANCE:.0%} of ln(vocabulary), and a standard deviation over rows of {SPREAD:.0%} of it",
    source="exact: a model that gives all tokens the same probability has the loss ln(vocabulary)",
    action="check that model.id is a trained model with its own tokenizer, and knows these rows' language; an adapter "
    "can hardly make up for it",
)


@dataclass(frozen=True)
class AdapterParameter:
    """A parameter of the adapter, and what became of it in the first updates.

    `module` is what it adapts, as a path in the base. `is_reached`: by a gradient that is not 0; `is_moved`: an update
    changed it; `is_held`: the optimizer has it.
    """

    name: str
    module: str
    requires_grad: bool
    is_held: bool
    is_reached: bool
    is_moved: bool


def find_adapted(model: Any, name: str) -> str:
    """The path in the base of the module or parameter that the adapter's parameter `name` belongs to."""
    path = name.split(".lora_")[0].split(".modules_to_save.")[0].split(NEW_ROWS)[0]
    return adapted_path(path.removeprefix("base_model.model."), model.get_submodule(path))


def explain_still_modules(parameters: Sequence[AdapterParameter]) -> dict[str, str]:
    """The cause for each adapted module that does not train; empty if all do.

    A module of a mixture's experts may be used by no token of the first steps, so that one without a gradient is not
    judged.
    """
    modules: dict[str, list[AdapterParameter]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.module, []).append(parameter)
    causes = {name: _explain_module(name, each) for name, each in modules.items()}
    return {name: cause for name, cause in causes.items() if cause}


def _explain_module(name: str, parameters: Sequence[AdapterParameter]) -> str:
    frozen = [p.name.rsplit(".lora_", 1)[-1] for p in parameters if not p.requires_grad]
    if frozen:
        return f"{FROZEN} ({'all of it' if len(frozen) == len(parameters) else f'lora_{frozen[0]}'})"
    reached = [p for p in parameters if p.is_reached]
    if not reached:
        may_rest = "expert" in name or NEW_ROWS in parameters[0].name  # tokens of the first steps may not need it
        return "" if may_rest else "no gradient reaches it: the forward pass does not use it, or its B is frozen"
    if not all(p.is_held for p in reached):
        return "the optimizer does not hold its parameters"
    return (
        "" if any(p.is_moved for p in parameters) else "its updates are 0, though gradients and learning rate are not"
    )


class FirstStepsCheck(Callback):
    """Checks the base's loss before the first step, and after the second update that every adapted module trains.

    Cost: norms of the adapter's gradients and weights in two steps, and one sync point. It changes nothing.

    Args:
        run: where findings are added to preflight.json; None: they are only logged.
    """

    def __init__(self, plan: RunPlan, run: RunFolder | None) -> None:
        self.findings, self._plan, self._run = plan.findings, plan, run
        self._updates, self._base_rows = 0, np.array([])
        self._named: list[tuple[str, torch.nn.Parameter]] = []
        self._reached: torch.Tensor | None = None
        self._before: torch.Tensor | None = None
        self._experts: ExpertCheck | None = None

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        """Refuse a base whose loss is not finite.

        Raises:
            TrainingError: it is not; names the weight, if it is a weight's fault.
        """
        if base:
            _require_finite_base(trainer, report.loss)
            if report.row_nll is not None:
                self._base_rows = report.row_nll / trainer.validation.supervised_counts
            self._check_chance(report.loss, self._base_rows)

    def on_train_start(self, trainer: Any) -> None:
        self._named = [
            (name, parameter)
            for name, parameter in trainer.model.named_parameters()
            if ".lora_" in name or NEW_ROWS in name or parameter.requires_grad
        ]
        self._experts = ExpertCheck(trainer.model)

    def on_train_end(self, trainer: Any) -> None:
        if self._experts is not None:
            self._experts.finish()

    def on_gradients(self, trainer: Any, step: int) -> None:
        if self._updates >= UPDATES or not self._named:
            return
        parameters = [parameter for _, parameter in self._named]
        zero = torch.zeros((), device=trainer.processes.device)
        norms = torch._foreach_norm([zero if p.grad is None else p.grad for p in parameters])
        reached = torch.stack(norms) > 0
        self._reached = reached if self._reached is None else self._reached | reached
        self._before = _measure_weights(parameters) if self._before is None else self._before
        if self._experts is not None:
            self._experts.add_gradients()

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        """Stop a run in which nothing, or not every adapted module, trains.

        Raises:
            TrainingError: names the modules and the cause.
        """
        if self._updates >= UPDATES or not self._named:
            return
        if report.step == 1 and self._plan.config.peft.from_adapter is None:
            self._check_first_batch(trainer, report)
        is_update = math.isfinite(report.grad_norm) and report.lr > 0
        self._updates += is_update
        if report.step == 1 and is_update and report.grad_norm == 0:
            self._require_training_modules(trainer, report, only_frozen=True)
            require_gradients(trainer, report, self._plan.facts.vocabulary)
        if self._updates == UPDATES or report.step == trainer.schedule.total_steps:
            self._require_training_modules(trainer, report)
            if self._experts is not None:
                self._experts.finish()

    def _check_first_batch(self, trainer: Any, report: StepReport) -> None:
        """The base's loss on the first batch, which the fresh adapter leaves as it is."""
        if not len(self._base_rows):
            self._check_chance(report.loss, self._base_rows)
            return
        mean, rows = float(self._base_rows.mean()), len(report.example_ids)
        error = float(self._base_rows.std()) * math.sqrt(1 / rows + 1 / len(self._base_rows))
        difference = report.loss - mean
        if abs(difference) > UNLIKE_SIGMAS * error and abs(difference) > UNLIKE_SHARE * mean:
            rule = replace(
                UNLIKE,
                threshold=f"{UNLIKE_SIGMAS:g} standard errors, and {UNLIKE_SHARE:.0%} of the loss",
                source="two-sample z-test of the base's loss on the first batch and on the validation rows",
            )
            self._add_finding(
                rule.report_symptom(
                    "warning",
                    "Validation rows are unlike training rows for the base",
                    f"its loss is {report.loss:.3f} on the first {rows} training rows, and {mean:.3f} +- {error:.3f} "
                    f"on {len(self._base_rows)} validation rows",
                    evidence={"first_batch": report.loss, "validation": mean, "standard_error": error},
                )
            )

    def _check_chance(self, loss: float, row_losses: np.ndarray) -> None:
        """Whether the base guesses: its loss is ln(vocabulary), and that of every row is about the same."""
        chance = math.log(self._plan.facts.vocabulary)
        spread = float(row_losses.std()) if len(row_losses) > 1 else 0.0
        measured = (
            f"{loss:.3f} nats per token, {loss / chance:.2f} of ln({self._plan.facts.vocabulary:,}) = {chance:.3f}; "
            f"standard deviation over {len(row_losses)} rows {spread:.3f}"
        )
        evidence = {"loss": loss, "chance": chance, "spread": spread}
        if abs(loss - chance) < NEAR_CHANCE * chance and spread < SPREAD * chance:
            title = "The base is no language model of these rows"
            found = BASE.report_symptom("warning", title, measured, confidence="likely", evidence=evidence)
        elif loss > chance:
            title = "The base predicts these rows worse than guessing would"
            found = BASE.report_symptom("note", title, measured, evidence=evidence)
        elif loss > UNSURE * chance:
            decide = "training-lens baseline, which shows what the base alone answers"
            found = BASE.report_inconclusive("The base hardly knows these rows", measured, decide, evidence)
        else:
            found = BASE.report_fine("The base is a language model of these rows", measured, "likely", evidence)
        self._add_finding(found)

    def _add_finding(self, found: Finding) -> None:
        self.findings = sort_findings([*self.findings, found])
        if self._run is not None and self._plan.findings:  # a resumed run has said so when it began
            log_findings([found])
            write_findings(self.findings, self._run.reports)

    def _require_training_modules(self, trainer: Any, report: StepReport, only_frozen: bool = False) -> None:
        if self._reached is None or self._before is None:
            return
        parameters = [parameter for _, parameter in self._named]
        moved = _measure_weights(parameters) != self._before
        moved |= self._before.dtype != torch.float64  # float32 may not show a small update
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        found = torch.stack([self._reached, moved]).tolist()  # the check's sync point
        checked = [
            AdapterParameter(name, find_adapted(trainer.model, name), p.requires_grad, id(p) in held, *outcome)
            for (name, p), *outcome in zip(self._named, *found, strict=True)
        ]
        causes, experts = explain_still_modules(checked), None
        if self._experts is not None and not only_frozen:
            experts = self._experts.judge()
            causes |= {name: why for name, why in experts.causes.items() if name.partition("[")[0] not in causes}
        if only_frozen:
            causes = {name: cause for name, cause in causes.items() if cause.startswith(FROZEN)}
        if causes and self._updates:
            counts = f"{len({p.module for p in checked})} adapted modules"
            counts += f" and {experts.total} experts" if experts is not None and experts.total else ""
            raise _still_modules_error(causes, counts, report)
        if experts is not None and experts.not_routed:
            logger.info(
                "step %d: %d of %d adapted experts were not routed to yet, and stay as they were: %s",
                *(report.step, len(experts.not_routed), experts.total, list_names(experts.not_routed, SHOWN)),
            )


def _measure_weights(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The norm of each parameter, (parameters,): in float64, where the smallest update shows."""
    wide = parameters[0].device.type != "mps"  # it has no float64
    with torch.no_grad():
        return torch.stack(torch._foreach_norm(list(parameters), 2, torch.float64 if wide else None))


def _require_finite_base(trainer: Any, loss: float) -> None:
    if math.isfinite(loss):
        return
    cause = describe_broken_weights(trainer.model) or (
        f"All its weights are finite, so values overflow in {trainer.precision}: try training.precision=fp32, or "
        "another base."
    )
    raise TrainingError(f"before step 1: the base's own loss on the validation rows is {loss}. {cause}")


def require_gradients(trainer: Any, report: StepReport, vocabulary: int) -> None:
    """Refuse a first step in which every gradient is 0 and the loss is not.

    Raises:
        TrainingError: names the weights of the base that are all zero, if there are any.
    """
    if report.grad_norm or not report.loss:
        return
    chance = math.log(vocabulary)
    near = (
        f", about ln({vocabulary:,}): all tokens are alike to it" if abs(report.loss - chance) < 0.05 * chance else ""
    )
    cause = describe_zero_weights(trainer.model) or (
        "No adapted module takes part in the loss: check that the adapter is active, and that its parameters require "
        "gradients."
    )
    raise TrainingError(
        f"step {report.step}: every gradient is 0, so nothing can be learned (loss {report.loss:.4f}{near}). {cause}"
    )


def _still_modules_error(causes: Mapping[str, str], adapted: str, report: StepReport) -> TrainingError:
    by_cause: dict[str, list[str]] = {}
    for name, cause in causes.items():
        by_cause.setdefault(cause, []).append(name)
    parts = [f"{cause}: {list_names(names, SHOWN)}" for cause, names in by_cause.items()]
    return TrainingError(
        f"step {report.step}: {len(causes)} of {adapted} do not train. {'; '.join(parts)}. Leave "
        "modules that these rows do not use out of peft.target_modules; a callback must not freeze or replace any."
    )
