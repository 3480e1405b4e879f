"""`training-lens rank`: what an adapter loses at smaller ranks, and the smaller adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import OF_ANY_RUN, Screen, command, load_config, refuse_unused, show_table
from training_lens.cli.find_runs import locate_run
from training_lens.cli.options import CommandOptions
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.analysis.findings import RankCheck

RunArgument = Annotated[
    str, typer.Argument(metavar="[RUN]", help="A run's id or folder, an experiment (its last run), or 'latest'.")
]
Write = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Write the adapter cut as --keep says, in PEFT's format.")
]
Keep = Annotated[
    str | None,
    typer.Option(metavar="KEEP", help="With --write: 90%, 95% or 99% of each module's |dW|², or a rank, such as 4."),
]
USED = ("data.validation", "evaluation.max_examples", "output.", *OF_ANY_RUN)


def rank(run: RunArgument = "latest", write: Write = None, keep: Keep = None, *, options: CommandOptions) -> None:
    """Measure the validation loss of a finished run with its adapter cut to smaller ranks, and write the smaller one.

    Examples: training-lens rank; training-lens rank RUN data.validation=test.jsonl;
    training-lens rank RUN --write smaller --keep 95%
    """
    with command(options) as screen:
        run, options = options.split_run(run)
        settings = load_config(options)
        refuse_unused(options.words, USED, "rank measures with the run's own config.")
        if (write is None) != (keep is None):
            raise ConfigurationError("--write and --keep go together: --write FOLDER --keep 90%.")
        found = locate_run(run, settings.output, finished=True)
        found.require_adapter()
        from training_lens.analysis.findings import measure_rank
        from training_lens.analysis.run_rows import RowOptions
        from training_lens.analysis.smaller_adapter import find_truncation, require_new_folder, write_smaller_adapter
        from training_lens.display.progress import Progress
        from training_lens.utils.names import expand_home

        if write:
            require_new_folder(expand_home(write))
        rows = RowOptions.from_settings(settings)
        progress = Progress(screen.console)
        check = measure_rank(found, rows.max_examples, rows.data, rows.device, progress, rows.given)
        _show_check(screen, check)
        result = {**asdict(check), "written": None}
        if write and keep:
            at = find_truncation(check, keep)
            written = write_smaller_adapter(found, expand_home(write), at, check.gain, rows, progress)
            screen.print_line(
                f"written to {written.folder}: read back, its loss is {written.loss:.4f} and each dW the best of its "
                f"rank (largest relative error {written.largest_error:.1g})"
            )
            result["written"] = asdict(written)
        screen.print_result(result)


def _show_check(screen: Screen, check: RankCheck) -> None:
    title = (
        f"loss on {check.rows} validation rows, {check.supervised_tokens} supervised tokens; base "
        f"{check.base_loss:.4f}, gain {check.gain:.4f}"
    )
    rows = [("all", f"{check.parameters or 0:,}", f"{check.loss:.4f}", "", "", "")]
    for at in check.truncations:
        interval = "-" if at.low is None or at.high is None else f"{at.low:+.4f} to {at.high:+.4f}"
        kept = f"{1 - at.delta / check.gain:.1%}" if check.gain > 0 else "-"
        name = at.label if at.share else f"rank {at.label}"
        rows.append((name, f"{at.parameters or 0:,}", f"{at.loss:.4f}", f"{at.delta:+.4f}", interval, kept))
    numbers = ("parameters", "loss", "change", "its 95% interval", "gain kept")
    show_table(screen.console, title, ("kept of dW", *numbers), rows, right=numbers)
    screen.print_line("90%: each module keeps the directions that hold 90% of its |dW|²; rank 4: four in each")
    if check.rank_pattern:
        pattern = ", ".join(f"{name}: {size}" for name, size in check.rank_pattern.items())
        screen.print_line(f"to train with the ranks of 90%: peft.rank_pattern={{{pattern}}}")
