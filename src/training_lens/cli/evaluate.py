"""`training-lens evaluate` and `baseline`: one model alone on rows."""

from __future__ import annotations

from typing import Annotated

import typer

from training_lens.cli.common import (
    AdapterRun,
    ConfigFile,
    Debug,
    Json,
    Overrides,
    command,
    load_adapter_config,
    load_config,
    refuse_unused,
)
from training_lens.cli.evaluation_output import USED, finish, opened, refuse_base_only
from training_lens.cli.preflight import check_own_model

BaseOf = Annotated[
    str | None, typer.Option("--run", metavar="RUN", help="The base of this run, on its validation rows.")
]
Base = Annotated[bool, typer.Option("--base", help="Judge the base model under the adapter.")]


def evaluate(
    overrides: Overrides = None,
    run: AdapterRun = None,
    base: Base = False,
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate one adapter on its validation rows: losses and scored answers, with intervals, by length and domain.

    Examples: training-lens evaluate; training-lens evaluate --run RUN data.validation=test.jsonl;
    training-lens evaluate --run ADAPTER_FOLDER model.id=PATH data.validation=test.jsonl evaluation.generate=false
    """
    with command(json, debug) as screen:
        refuse_base_only(overrides, "evaluation.decide_by")
        settings = load_adapter_config(config, overrides, run, USED)
        evaluator, examples, folder = opened(screen, settings)
        result = evaluator.evaluate(examples, base=base)
        finish(screen, result, evaluator, folder, "evaluation-of-base" if base else "evaluation")


def baseline(
    overrides: Overrides = None,
    run: BaseOf = None,
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate a base model before any training, on the rows that a config would validate on.

    Examples: training-lens baseline model.id=PATH data.validation=test.jsonl; training-lens baseline --config my.yaml;
    training-lens baseline --run RUN
    """
    with command(json, debug) as screen:
        refuse_base_only(overrides, "evaluation.decide_by")
        if run is not None:
            settings = load_adapter_config(config, overrides, run, USED)
            evaluator, examples, folder = opened(screen, settings)
            finish(screen, evaluator.evaluate(examples, base=True), evaluator, folder, "baseline")
            return
        used = ("evaluation.", "data.", "model.", "output.", "training.seed")
        refuse_unused(overrides, used, "baseline evaluates model.id alone, before any training.")
        settings = load_config(config, overrides, {"inference": {"adapter": "none"}})
        check_own_model(settings)
        evaluator, examples, folder = opened(screen, settings)
        finish(screen, evaluator.evaluate(examples), evaluator, folder, "baseline")
