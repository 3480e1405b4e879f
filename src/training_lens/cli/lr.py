"""`training-lens lr`: the learning rate, from short runs on a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import Screen, command, load_config, show_table
from training_lens.cli.missing_files import check_training
from training_lens.cli.options import CommandOptions
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.sweeps.rate_finder import RateSearch

Steps = Annotated[int, typer.Option(min=5, help="Steps of each run; at most those of the whole run.")]
Points = Annotated[int, typer.Option(min=3, help="Rates of the grid.")]
Factor = Annotated[float, typer.Option(min=1.1, max=100.0, help="From one rate of the grid to the next.")]
Seeds = Annotated[int, typer.Option(min=1, max=9, help="Seeds; those after the first run at the five best rates.")]
Rates = Annotated[
    str | None, typer.Option(metavar="LIST", help="The rates themselves, in place of the grid: 1e-4,3e-4,1e-3.")
]


def lr(
    steps: Steps = 60,
    points: Points = 7,
    factor: Factor = 2.0,
    seeds: Seeds = 2,
    rates: Rates = None,
    *,
    options: CommandOptions,
) -> None:
    """Find the learning rate of a config: short exact runs on a grid of rates, compared by their held-out loss.

    The grid is around training.lr, or around the rate that the model's width gives. Nothing is kept but the report.

    Examples: training-lens lr; training-lens lr model.id=PATH data.train=rows.jsonl data.val_ratio=0.1;
    training-lens lr --config my.yaml --steps 100 --rates 1e-4,3e-4,1e-3
    """
    with command(options) as screen:
        settings = load_config(options)
        check_training(settings)
        asked = _read_rates(rates)
        from training_lens.display.progress import Progress
        from training_lens.sweeps.rate_finder import RateFinder, RateOptions

        grid = RateOptions(steps, points, factor, seeds, asked)
        progress = Progress(screen.console)
        found = RateFinder(settings, grid, progress=progress, announce=screen.print_line).search()
        _show_search(screen, found, settings.output.base_output_dir, settings.output.experiment_name)


def _read_rates(text: str | None) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise ConfigurationError(f"--rates {text}: give numbers with commas between them, 1e-4,3e-4,1e-3.") from None


def _show_search(screen: Screen, found: RateSearch, base_output_dir: str, experiment_name: str) -> None:
    from training_lens.runs.run_folder import new_run_id, runs_folder
    from training_lens.sweeps.rate_report import build_rate_report, describe_search, rate_table

    table = rate_table(found)
    show_table(screen.console, table.caption, table.columns, table.rows, right=set(table.columns) - {"end"})
    folder = runs_folder(base_output_dir, experiment_name).with_name("rates") / new_run_id()
    build_rate_report(found).write_all(folder, "lr", table)
    screen.print_line(f"saved as {folder / 'lr'}.{{json,md,csv,html}}; {found.seconds:g} s")
    for line in describe_search(found):
        screen.print_line(line)
    screen.print_result({**found.as_json(), "report": str(folder / "lr.html")})
