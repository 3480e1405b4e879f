"""`training-lens compare`: an adapter against its base, or against another run, on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import AdapterRun, Screen, command, load_adapter_config
from training_lens.cli.evaluation_output import (
    EVALUATION_KEYS,
    open_evaluator,
    refuse_base_only,
    report_broken_adapter,
    report_result,
)
from training_lens.cli.find_runs import locate_adapter
from training_lens.cli.options import CommandOptions
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig
    from training_lens.inference.session import Session

ON_THE_WAY = ("experiments", "runs", "artifacts", "checkpoints", "adapter")
Against = Annotated[
    str | None, typer.Option(metavar="RUN", help="Another run or adapter to compare with, in place of the base.")
]


def compare(run: AdapterRun = None, against: Against = None, *, options: CommandOptions) -> None:
    """Say whether an adapter is better than its base, or than another run: one sentence, then the evidence.

    Both answer the same rows: losses, scored answers, differences with intervals, controls, how answers end.

    Examples: training-lens compare; training-lens compare --run RUN evaluation.max_examples=200;
    training-lens compare --run RUN --against OTHER_RUN; training-lens compare data.validation=other_rows.jsonl
    """
    with command(options) as screen:
        if against is not None:
            from training_lens.runs.run_lookup import uses_own_model

            refuse_base_only(options.words)
            own = ("model.", "data.") if uses_own_model(against) else ()  # an adapter folder needs `model.id`
            settings = load_adapter_config(options, run, (*EVALUATION_KEYS, *own))
            other = locate_adapter(settings.replace_keys(inference={"adapter": against}))
            _compare_two(screen, settings, other.inference.adapter)
            return
        settings = load_adapter_config(options, run, EVALUATION_KEYS)
        evaluator, examples, folder = open_evaluator(screen, settings)
        _require_adapter(evaluator.session)
        from training_lens.evaluation.run_evaluation import BrokenAdapterError

        try:
            result = evaluator.compare(examples)
        except BrokenAdapterError as error:
            report_broken_adapter(screen, error, evaluator, folder)
            raise
        report_result(screen, result, evaluator, folder, "compare")


def _compare_two(screen: Screen, settings: TrainingConfig, against: str) -> None:
    """Compare the adapter that the settings name with another one."""
    from training_lens.evaluation.run_evaluation import ModelEvaluator
    from training_lens.inference.session import open_session

    evaluator, examples, folder = open_evaluator(screen, settings)
    _require_adapter(evaluator.session)
    other = open_session(settings.replace_keys(inference={"adapter": against}))
    _require_adapter(other)
    result = evaluator.compare_with(ModelEvaluator(other, settings.evaluation, evaluator.progress), examples)
    report_result(screen, result, evaluator, folder, f"compare-with-{_name_source(other.source)}")


def _name_source(source: str) -> str:
    """A short name of a run or adapter for a file name: 'default-20261120T203605Z-5f3a'."""
    places = [part for part in Path(source).absolute().parts[1:] if part not in ON_THE_WAY]
    return "-".join(places[-2:])


def _require_adapter(session: Session) -> None:
    if not session.has_adapter:
        raise ConfigurationError(
            f"'{session.source}' has no adapter to compare; name a run or an adapter folder, or evaluate a model "
            "alone with training-lens baseline."
        )
