"""`training-lens combine`: several adapters of one base as one adapter, verified, and scored on the rows of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training_lens.cli.common import OF_ANY_RUN, Screen, command, load_config, refuse_unused, show_table
from training_lens.cli.find_runs import is_adapter_folder, locate_run
from training_lens.cli.infer import is_setting
from training_lens.cli.merge import show_checks
from training_lens.cli.options import ConfigOptions
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.combining.combine_runs import Combination
    from training_lens.config.schema import OutputSection
    from training_lens.runs.run_folder import RunFolder

Runs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN RUN... [KEY=VALUE]...",
        help="Each a run's id or folder, or an experiment (its last run), all of one base. Then settings, such as "
        "output.run_id=both.",
        show_default=False,
    ),
]
How = Annotated[
    Literal["cat", "linear", "svd", "ties", "dare"],
    typer.Option(
        help="cat: the exact sum of the updates, ranks add up; svd: that sum cut to --rank; linear: the sums of the "
        "factors, as in PEFT; ties, dare: pruned updates added up, cut to --rank."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="A number for each run, such as 0.7,0.3. Default: their mean, 1 / runs for each; ties, a mean itself: 1.",
    ),
]
Density = Annotated[
    float | None, typer.Option(help="ties, dare: the share of each update's numbers that is kept. Default: 0.5.")
]
Rank = Annotated[
    int | None, typer.Option(help="svd, ties, dare: the rank of the result. Default: the largest among the runs.")
]
Seed = Annotated[int | None, typer.Option(help="dare: draws the numbers that are kept. Default: 0.")]
Metric = Annotated[str | None, typer.Option(metavar="NAME", help="Also a score of the answers, such as exact_match.")]
USED = ("data.validation", "evaluation.", "output.", *OF_ANY_RUN)


@dataclass(frozen=True)
class CombineOptions:
    """How adapters are combined, and what the result is scored by."""

    how: How = "cat"
    weights: Weights = None
    density: Density = None
    rank: Rank = None
    seed: Seed = None
    metric: Metric = None


def combine(runs: Runs = None, *, asked: CombineOptions, options: ConfigOptions) -> None:
    """Combine the adapters of several runs of one base into one adapter, in a run of its own.

    It is read back and compared with what the method defines, and scored on the validation rows of every run.

    Examples: training-lens combine support sales; training-lens combine RUN RUN --how ties --density 0.3 --rank 16;
    training-lens combine RUN RUN --weights 0.7,0.3 --metric exact_match output.run_id=both
    """
    with command(options) as screen:
        words, references = _split_words(runs or [])
        from training_lens.combining.combine_recipe import build_recipe

        weights = _read_weights(asked.weights)
        recipe = build_recipe(asked.how, len(references), weights, asked.density, asked.rank, asked.seed)
        settings = load_config(options.with_words(words))
        refuse_unused(words, USED, "combine takes everything else from the runs.")
        found = [_locate(reference, settings.output) for reference in references]
        from training_lens.analysis.run_rows import RowOptions
        from training_lens.combining.combine_runs import Measurement, combine_runs
        from training_lens.combining.parents import open_parents
        from training_lens.display.progress import Progress
        from training_lens.runs.run_folder import RunFolder, describe_scale, new_run_id, runs_folder

        parents = open_parents(found, recipe)
        for parent in parents:
            if parent.scale != 1:
                screen.print_line(f"{parent.name}: {describe_scale(parent.run)}")
        output = settings.output
        experiment = output.named_experiment or found[0].experiment_name or output.experiment_name
        target = RunFolder(runs_folder(output.base_output_dir, experiment) / (output.run_id or new_run_id()))
        measurement = Measurement(RowOptions.from_settings(settings), settings.evaluation, asked.metric)
        combination = combine_runs(parents, recipe, target, measurement, Progress(screen.console))
        _show_combination(screen, combination)
        screen.print_result(combination.as_json())


def _split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings, and references of runs, of which there must be two."""
    settings = [word for word in words if is_setting(word)]
    references = [word for word in words if not is_setting(word)]
    if len(references) < 2:
        given = f"only '{references[0]}'" if references else "none"
        raise ConfigurationError(f"two runs or more are combined, given {given}: training-lens combine RUN RUN.")
    return settings, references


def _read_weights(text: str | None) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise ConfigurationError(f"--weights {text}: give numbers with commas between them, such as 0.7,0.3.") from None


def _locate(reference: str, output: OutputSection) -> RunFolder:
    if is_adapter_folder(reference):
        raise ConfigurationError(
            f"{reference} is an adapter without its run, so its prompts, base and validation rows are unknown. "
            "Give the run that trained it."
        )
    return locate_run(reference, output, finished=True)


def _show_combination(screen: Screen, combination: Combination) -> None:
    from training_lens.combining.combine_runs import describe_lines

    tasks, metric = combination.tasks, combination.metric
    weights = {parent.name: f"{parent.weight:g}" for parent in combination.parents}
    columns = [f"loss on {task.rows} rows of {task.name}" for task in tasks]
    columns += [f"{metric} of {task.name}" for task in tasks if metric]
    rows = []
    for model in tasks[0].losses:
        cells = [f"{task.losses[model]:.4f}" for task in tasks]
        cells += [f"{task.answers[model]:.3f}" for task in tasks if metric]
        rows.append((model, weights.get(model, ""), *cells))
    parameters = combination.adapter.count_parameters()
    title = f"{combination.recipe.how} of {len(combination.parents)} adapters, {parameters:,} parameters"
    show_table(screen.console, title, ("model", "weight", *columns), rows, right=columns)
    show_checks(screen, "", combination.as_json())
    for line in describe_lines(combination):
        screen.print_line(line)
    for line in combination.warnings:
        screen.print_line(f"warning: {line}", style="yellow")
    screen.print_line(f"\nit answers as a run: training-lens infer --run {combination.run.root}")
