"""`training-lens knob`: an adapter's update times 0 to 1.5, and the scale that the run answers with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import OF_ANY_RUN, Screen, command, load_config, refuse_unused, show_table
from training_lens.cli.find_runs import locate_run
from training_lens.cli.options import CommandOptions
from training_lens.cli.truncate_rank import RunArgument
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.analysis.run_rows import RowOptions
    from training_lens.analysis.scale_sweep import Knob
    from training_lens.config.schema import TrainingConfig
    from training_lens.runs.run_folder import RunFolder

Scales = Annotated[
    str | None, typer.Option(metavar="LIST", help="Scales to measure, such as 0,0.5,0.8,1; 0 and 1 are always there.")
]
General = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="General text, read as data.train; without it, text that the base samples."),
]
Metric = Annotated[
    str | None, typer.Option(metavar="NAME", help="Also a score of the answers at each scale, such as exact_match.")
]
Choose = Annotated[
    str | None,
    typer.Option(
        metavar="SCALE",
        help="The run answers with its update times this number from now on: infer, evaluate, compare, benchmark, "
        "merge and push. 'offered' measures first; 1 takes it back.",
    ),
]
OFFERED = "offered"
USED = ("data.validation", "evaluation.", "output.", *OF_ANY_RUN)


def knob(
    run: RunArgument = "latest",
    scales: Scales = None,
    general: General = None,
    metric: Metric = None,
    choose: Choose = None,
    *,
    options: CommandOptions,
) -> None:
    """Measure a finished adapter at scales of its update: task loss, KL to the base, loss on general text.

    The point that keeps 95 % of the gain at the least KL is offered, and nothing changes until --choose.

    Examples: training-lens knob; training-lens knob RUN --metric exact_match --general notes.txt;
    training-lens knob RUN --choose 0.8; training-lens knob RUN --choose offered
    """
    with command(options) as screen:
        run, options = options.split_run(run)
        chosen = _read_choice(choose)
        settings = load_config(options, {"evaluation": {"forgetting": general}} if general else None)
        refuse_unused(options.words, USED, "knob measures with the run's own config.")
        found = locate_run(run, settings.output, finished=True)
        found.require_adapter()
        if chosen is None:
            from training_lens.analysis.run_rows import RowOptions

            rows = RowOptions.from_settings(settings)
            measured = _measure(screen, found, rows, settings, _read_scales(scales), metric)
            result = measured.as_json()
            chosen = _find_offered(measured) if choose else None
        else:
            result = {"run": str(found.root)}
        if chosen is not None:
            _choose(screen, found, chosen, settings)
        screen.print_result({**result, "chosen": found.adapter_scale})


def _read_choice(choose: str | None) -> float | None:
    """The number that is chosen without measuring; None for none, or for the one that will be offered."""
    if choose in (None, OFFERED):
        return None
    try:
        return float(choose or "")
    except ValueError:
        raise ConfigurationError(f"--choose {choose}: give a number such as 0.8, or '{OFFERED}'.") from None


def _read_scales(text: str | None) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise ConfigurationError(f"--scales {text}: give numbers with commas between them, 0,0.5,1.") from None


def _measure(
    screen: Screen,
    run: RunFolder,
    rows: RowOptions,
    settings: TrainingConfig,
    scales: list[float] | None,
    metric: str | None,
) -> Knob:
    from training_lens.analysis.knob_report import build_knob_report, describe_knob, knob_table
    from training_lens.analysis.scale_sweep import SCALES, KnobOptions, measure_knob
    from training_lens.display.progress import Progress

    asked = KnobOptions(scales or SCALES, metric)
    measured = measure_knob(run, rows, settings.evaluation, asked, Progress(screen.console), screen.print_line)
    table = knob_table(measured)
    title = f"loss on {measured.rows} rows; general text: {measured.general_source}, {measured.general_rows} rows"
    show_table(screen.console, title, table.columns, table.rows, right=set(table.columns) - {"adapter"})
    for line in (*measured.notes, *describe_knob(measured)):
        screen.print_line(line)
    build_knob_report(measured).write_all(run.reports, "knob", table)
    screen.print_line(f"saved as {run.reports / 'knob'}.{{json,md,csv,html}}")
    if measured.offered:
        screen.print_line(f"to use it: training-lens knob {run.root} --choose {measured.offered}")
    return measured


def _find_offered(measured: Knob) -> float:
    """The offered scale; a `ConfigurationError` if none is."""
    point = measured.find(measured.offered)
    if point is None or point.scale is None:
        raise ConfigurationError(f"--choose {OFFERED}: {measured.reason}. Nothing was changed.")
    return point.scale


def _choose(screen: Screen, run: RunFolder, scale: float, settings: TrainingConfig) -> None:
    from training_lens.analysis.chosen_scale import choose_scale
    from training_lens.runs.run_folder import describe_scale

    choose_scale(run, scale, settings.model.chosen_device, settings.explicit_values())
    says = (
        "the run answers as trained" if scale == 1 else f"from now on {describe_scale(run)}; --choose 1 takes it back"
    )
    screen.print_line(says)
