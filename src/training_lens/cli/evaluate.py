"""`training-lens evaluate` and `baseline`: one model alone on rows."""

from __future__ import annotations

from typing import Annotated

import typer

from training_lens.cli.common import AdapterRun, command, load_adapter_config, load_config, refuse_unused
from training_lens.cli.evaluation_output import EVALUATION_KEYS, open_evaluator, refuse_base_only, report_result
from training_lens.cli.missing_files import check_own_model
from training_lens.cli.options import CommandOptions

BaseOf = Annotated[
    str | None, typer.Option("--run", metavar="RUN", help="The base of this run, on its validation rows.")
]
Base = Annotated[bool, typer.Option("--base", help="Evaluate the base model under the adapter.")]


def evaluate(run: AdapterRun = None, base: Base = False, *, options: CommandOptions) -> None:
    """Evaluate one adapter on its validation rows: losses and scored answers, with intervals, by length and domain.

    Examples: training-lens evaluate; training-lens evaluate --run RUN data.validation=test.jsonl;
    training-lens evaluate --run ADAPTER_FOLDER model.id=PATH data.validation=test.jsonl evaluation.generate=false
    """
    with command(options) as screen:
        refuse_base_only(options.words, "evaluation.decide_by")
        settings = load_adapter_config(options, run, EVALUATION_KEYS)
        evaluator, examples, folder = open_evaluator(screen, settings)
        result = evaluator.evaluate(examples, base=base)
        report_result(screen, result, evaluator, folder, "evaluation-of-base" if base else "evaluation")


def baseline(run: BaseOf = None, *, options: CommandOptions) -> None:
    """Evaluate a base model before any training, on the rows that a config would validate on.

    Examples: training-lens baseline model.id=PATH data.validation=test.jsonl; training-lens baseline --config my.yaml;
    training-lens baseline --run RUN
    """
    with command(options) as screen:
        refuse_base_only(options.words, "evaluation.decide_by")
        if run is not None:
            settings = load_adapter_config(options, run, EVALUATION_KEYS)
            evaluator, examples, folder = open_evaluator(screen, settings)
            report_result(screen, evaluator.evaluate(examples, base=True), evaluator, folder, "baseline")
            return
        used = ("evaluation.", "data.", "model.", "output.", "training.seed")
        refuse_unused(options.words, used, "baseline evaluates model.id alone, before any training.")
        settings = load_config(options, {"inference": {"adapter": "none"}})
        check_own_model(settings)
        evaluator, examples, folder = open_evaluator(screen, settings)
        report_result(screen, evaluator.evaluate(examples), evaluator, folder, "baseline")
