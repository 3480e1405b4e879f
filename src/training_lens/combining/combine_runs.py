"""Runs to one run that answers with the combination of their adapters: combined, verified and scored, then kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from training_lens.analysis.run_rows import RowOptions
from training_lens.combining.combination_scores import TaskScores, collect_rows, score_combination
from training_lens.combining.combine_recipe import Recipe
from training_lens.combining.combined_adapter import (
    CombinedAdapter,
    combine_modules,
    verify_adapter,
    write_adapter,
)
from training_lens.combining.combined_data import CombinedData, combine_data
from training_lens.combining.parents import BASE, COMBINATION, Parent, read_weighted_updates
from training_lens.combining.shared_prompt import require_same_prompts
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.config.run_config import read_run_config, remember_consent
from training_lens.config.schema import TrainingConfig
from training_lens.display.progress import Progress
from training_lens.evaluation.evaluation_rows import EvaluationRows
from training_lens.inference.heldout_examples import validation_examples
from training_lens.inference.session import Session, open_run
from training_lens.merging.verification import MergeCheck
from training_lens.models.adapter_files import WEIGHTS, read_config
from training_lens.models.adapters import Adaptation, count_parameters
from training_lens.models.copies import copy_base
from training_lens.runs.run_folder import RunFolder
from training_lens.training.run import describe_environment
from training_lens.training.summary import TrainingSummary, write_summary
from training_lens.utils.files import hash_file, list_files
from training_lens.utils.integrity import record_hashes, write_sealed

PEFT_KEYS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
NOT_TAKEN = ("tracking", "sweep", "prepare", "lens")  # sections of the first run that a combination does not have


@dataclass(frozen=True)
class Measurement:
    """What the combination is scored by: the rows, the options of evaluation, and a metric of answers besides."""

    rows: RowOptions
    settings: EvaluationSection
    metric: str | None = None


@dataclass(frozen=True)
class Combination:
    """A run that was written; `notes` are differences between the runs that may be meant."""

    run: RunFolder
    recipe: Recipe
    parents: Sequence[Parent]
    adapter: CombinedAdapter
    checks: Sequence[MergeCheck]
    tasks: Sequence[TaskScores]
    notes: Sequence[str]
    metric: str | None
    total_parameters: int  # of the base and the combination
    has_all_rows: bool  # evaluate and compare measure it on the rows of all runs, not on the first one's alone

    @property
    def warnings(self) -> list[str]:
        """The tasks on which it is worse than the base."""
        return [task.describe_harm() for task in self.tasks if task.is_worse_than_base]

    def as_json(self) -> dict[str, Any]:
        """The content of combination.json."""
        return {
            "run": str(self.run.root),
            **asdict(self.recipe),
            "runs": [_describe_parent(parent) for parent in self.parents],
            "parameters": self.adapter.count_parameters(),
            "distance_from_sum": self.adapter.from_sum,
            "modules": {
                path: {"rank": module.rank, "energy_kept": module.energy_kept}
                for path, module in self.adapter.modules.items()
            },
            "checks": [check.as_json() for check in self.checks],
            "metric": self.metric,
            "tasks": [task.as_json() for task in self.tasks],
            "rows_of_all_runs": self.has_all_rows,
            "notes": list(self.notes),
            "warnings": self.warnings,
        }


def _describe_parent(parent: Parent) -> dict[str, Any]:
    return {
        "name": parent.name,
        "run": str(parent.run.root),
        "weight": parent.weight,
        "adapter_scale": parent.scale,
        "sha256": hash_file(parent.adapter / WEIGHTS),
    }


def combine_runs(
    parents: Sequence[Parent], recipe: Recipe, target: RunFolder, measurement: Measurement, progress: Progress
) -> Combination:
    """Combine adapters into the new run `target`, which appears only after its checks and scores.

    It has config and prompts of the first run, and the domains of all.

    Raises:
        ConfigurationError: the runs prompt differently, a run has no validation rows, or `target` exists.
        AdapterError: what cannot be combined rightly, or a check failed; CheckpointError: see `open_run`.
        EvaluationError: a model failed on the rows.
    """
    target.require_new()
    updates = read_weighted_updates(parents, recipe)
    sessions, base = _open_sessions(parents, measurement.rows)
    notes = require_same_prompts(sessions, [parent.name for parent in parents])
    if measurement.rows.data:
        notes.append("the rows are those of data.validation, read as each run reads its own")
    rows = _read_rows(parents, sessions, measurement.rows)
    combined, data = combine_modules(updates, recipe, progress), combine_data(parents)
    found: list[Combination] = []

    def fill(building: RunFolder) -> None:
        building.adapter.mkdir(parents=True)
        write_adapter(combined, parents, base.model, building.adapter)
        checks = verify_adapter(updates, recipe, building.adapter)
        _write_run(building, target, combined, parents[0].run, data)
        session = open_run(building, given=measurement.rows.given, beside=base)
        collected = collect_rows(parents, sessions, rows, progress)
        tasks = score_combination(collected, session, measurement.settings, measurement.metric, progress)
        combination = Combination(
            target,
            recipe,
            parents,
            combined,
            checks,
            tasks,
            notes,
            measurement.metric,
            count_parameters(session.model).total,
            data.is_of_all,
        )
        write_sealed(building.combination_record, combination.as_json())
        record_hashes(building.root, [*list_files(building.adapter), *list_files(building.tokenizer)])
        write_summary(building, _summarize(combination, measurement))
        found.append(combination)

    target.create(fill)
    remember_consent(target.root, read_run_config(target))
    return found[0]


def _open_sessions(parents: Sequence[Parent], options: RowOptions) -> tuple[list[Session], Session]:
    """A session of each run, all on one copy of the base in memory, and one of the base alone."""
    sessions: list[Session] = []
    base: Session | None = None
    for parent in parents:
        session = open_run(parent.run, options.device, given=options.given, beside=base)
        base = replace(session, model=copy_base(session.model), adapter=None)
        sessions.append(session)
    assert base is not None
    return sessions, base


def _read_rows(parents: Sequence[Parent], sessions: Sequence[Session], options: RowOptions) -> list[EvaluationRows]:
    """The validation rows of each run, or the options' rows as each run reads them."""
    found = []
    for parent, session in zip(parents, sessions, strict=True):
        examples = validation_examples(parent.run, session, options.max_examples, options.data)
        found.append(EvaluationRows.from_examples(examples, session))
    return found


def _write_run(
    building: RunFolder, target: RunFolder, combined: CombinedAdapter, first: RunFolder, data: CombinedData
) -> None:
    """Write what a run needs to answer: config, data report, record of the base, tokenizer."""
    shutil.copytree(first.tokenizer, building.tokenizer)
    config = _build_config(first, target, building.adapter, data)
    building.write_metadata("config.json", config.model_dump())
    building.write_metadata("data.json", data.report)
    building.write_metadata("environment.json", describe_environment(config))
    building.write_metadata("adaptation.json", Adaptation(tuple(combined.modules), ()).as_json())
    if data.held_out is not None:
        building.write_metadata("held_out.json", data.held_out)
    if first.base_record.is_file():
        shutil.copyfile(first.base_record, building.base_record)


def _build_config(first: RunFolder, target: RunFolder, adapter: Path, data: CombinedData) -> TrainingConfig:
    values = read_run_config(first).explicit_values()
    written = read_config(adapter)
    output = {"experiment_name": target.experiment_name or "default", "run_id": target.run_id}
    peft = {key: written[key] for key in PEFT_KEYS if key in written} | {"target_parameters": "none"}
    kept = {name: section for name, section in values.items() if name not in NOT_TAKEN}
    return TrainingConfig.model_validate({**kept, "data": data.section, "output": output, "peft": peft})


def _summarize(combination: Combination, measurement: Measurement) -> TrainingSummary:
    """A summary without steps. Its validation losses are those on its rows, where these were measured whole."""
    tasks = combination.tasks if combination.has_all_rows else combination.tasks[:1]
    tokens, is_whole = sum(task.supervised_tokens for task in tasks), measurement.rows.max_examples is None
    losses = {
        name: sum(task.losses[name] * task.supervised_tokens for task in tasks) / tokens for name in (BASE, COMBINATION)
    }
    is_own = is_whole and measurement.rows.data is None
    return TrainingSummary(
        str(combination.run.root),
        "finished",
        validation_loss=losses[COMBINATION] if is_own else None,
        base_validation_loss=losses[BASE] if is_own else None,
        trainable_parameters=combination.adapter.count_parameters(),
        total_parameters=combination.total_parameters,
    )


def describe_lines(combination: Combination) -> list[str]:
    """What the numbers say, a sentence each, without warnings."""
    adapter, how = combination.adapter, combination.recipe.how
    lines = [*combination.notes]
    if how == "linear":
        lines.append(
            f"linear adds the factors: the result is {adapter.from_sum:.0%} of |S| away from S, the weighted sum of "
            "the updates, by cross terms; --how cat is S"
        )
    elif how != "cat":
        path, kept = adapter.least_kept
        lines.append(
            f"the rank keeps at least {kept:.1%} of each module's sum of squares ({path}); combination.json has "
            "every module"
        )
    lines += [task.describe(combination.metric) for task in combination.tasks]
    if combination.metric is None:
        lines.append(
            "near its own adapter's loss a task can still be answered wrongly: --metric exact_match scores answers"
        )
    lines += [
        f"{task.name}: {task.trained.describe()}"
        for task in combination.tasks
        if task.trained.leaked is None or task.trained.leaked.any()
    ]
    if not combination.has_all_rows:
        lines.append(
            f"the runs read or hold out their rows differently, so evaluate and compare measure the combination on "
            f"those of {combination.parents[0].name}; data.validation=FILE names others"
        )
    return lines
