"""`training-lens explain modules`: where an adapter's gain lives, and the adapter without what it does not need."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import OF_ANY_RUN, Screen, command, load_config, refuse_unused, show_table
from training_lens.cli.find_runs import is_adapter_folder, locate_run
from training_lens.cli.missing_files import check_own_model
from training_lens.cli.options import CommandOptions
from training_lens.cli.truncate_rank import RunArgument
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.analysis.explanations.drop_modules import DroppedAdapter
    from training_lens.analysis.explanations.explained_adapter import ExplainedAdapter
    from training_lens.analysis.explanations.module_gains import ModuleGains
    from training_lens.config.schema import TrainingConfig

Drop = Annotated[
    str | None,
    typer.Option(
        metavar="MODULES",
        help="With --write: 'offered' or a number, the modules of the least gain, which are measured first; or names "
        "with commas between them: q_proj,model.layers.3,lm_head.",
    ),
]
Write = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Write the adapter without the modules of --drop, in PEFT's format."),
]
OFFERED = "offered"
USED = ("data.validation", "evaluation.", "output.", *OF_ANY_RUN)


def explain_modules(
    run: RunArgument = "latest", drop: Drop = None, write: Write = None, *, options: CommandOptions
) -> None:
    """Share the gain of a finished adapter out among its modules, layers, types, domains and lengths.

    Beside the shares, which are integrated gradients with their residual, the loss is measured without each layer's
    adapter, with it alone, and without the modules of the least gain.

    Examples: training-lens explain modules; training-lens explain modules RUN data.validation=test.jsonl;
    training-lens explain modules RUN --drop offered --write smaller
    """
    with command(options) as screen:
        run, options = options.split_run(run)
        if (write is None) != (drop is None):
            raise ConfigurationError("--drop and --write go together: --drop offered --write FOLDER.")
        settings = load_config(options)
        adapter = open_explained(run, options.words, settings)
        from training_lens.analysis.smaller_adapter import require_new_folder
        from training_lens.utils.names import expand_home

        folder = expand_home(write) if write else None
        if folder:
            require_new_folder(folder)
        names, result = drop.split(",") if drop else [], {"run": adapter.source}
        if drop is None or drop == OFFERED or drop.isdigit():
            gains = _measure(screen, adapter, settings)
            names, result = _find_drop(gains, drop) if drop else [], gains.as_json()
        written = _write(screen, adapter, folder, names, settings) if folder else None
        screen.print_result({**result, "written": asdict(written) if written else None})


def open_explained(reference: str, words: list[str], settings: TrainingConfig) -> ExplainedAdapter:
    """The adapter that an explanation is of: of a run, or in a folder, then on the config's base and rows.

    Raises:
        ConfigurationError: a setting that is not used.
    """
    if is_adapter_folder(reference):
        refuse_unused(words, (*USED, "model.", "data."), "explain trains nothing.")
        own = settings.replace_keys(inference={"adapter": reference})
        check_own_model(own)
        from training_lens.analysis.explanations.explained_adapter import ExplainedAdapter

        return ExplainedAdapter.from_folder(own)
    refuse_unused(words, USED, "explain measures with the run's own config.")
    run = locate_run(reference, settings.output, finished=True)
    run.require_adapter()
    from training_lens.analysis.explanations.explained_adapter import ExplainedAdapter
    from training_lens.analysis.run_rows import RowOptions

    rows = RowOptions.from_settings(settings)
    return ExplainedAdapter.from_run(run, rows)


def _measure(screen: Screen, adapter: ExplainedAdapter, settings: TrainingConfig) -> ModuleGains:
    from training_lens.analysis.explanations import module_gains_report as report
    from training_lens.analysis.explanations.module_measurement import measure_modules
    from training_lens.display.progress import Progress

    session, rows = adapter.open_rows()
    gains = measure_modules(session, rows, settings.evaluation, Progress(screen.console), screen.print_line)
    tables = [report.layer_table(gains), report.kind_table(gains), *report.row_tables(gains), report.drop_table(gains)]
    for table in tables:
        show_table(screen.console, table.caption, table.columns, table.rows, right=set(table.columns[1:]))
    for line in (report.describe_check(gains), *report.describe_modules(gains), *report.describe_drops(gains)):
        screen.print_line(line)
    report.build_module_report(gains).write_all(adapter.reports, "explain-modules", report.module_table(gains))
    screen.print_line(f"saved as {adapter.reports / 'explain-modules'}.{{json,md,csv,html}}")
    return gains


def _find_drop(gains: ModuleGains, drop: str) -> list[str]:
    """The modules of a drop that was measured.

    Raises:
        ConfigurationError: none is offered, or none of this number was measured.
    """
    found = gains.find_drop(gains.offered if drop == OFFERED else drop)
    if found is None:
        known = ", ".join(each.label for each in gains.drops) or "none"
        reason = gains.reason if drop == OFFERED else f"was not measured; give one of {known}, or names"
        raise ConfigurationError(f"--drop {drop}: {reason}. Nothing was written.")
    return list(found.dropped)


def _write(
    screen: Screen, adapter: ExplainedAdapter, folder: Path, names: list[str], settings: TrainingConfig
) -> DroppedAdapter:
    from training_lens.analysis.explanations.drop_modules import write_without_modules
    from training_lens.display.progress import Progress

    written = write_without_modules(adapter, folder, names, settings.evaluation, Progress(screen.console))
    screen.print_line(
        f"written to {written.folder}: {written.kept} modules with {written.parameters:,} parameters; read back, its "
        f"loss is {written.loss:.4f}, that of the whole adapter {written.whole_loss:.4f}"
    )
    return written
