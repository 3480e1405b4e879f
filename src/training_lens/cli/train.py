"""`training-lens train`: fine-tune an adapter, or resume a run."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from training_lens.cli.common import Screen, command, load_config
from training_lens.cli.find_runs import is_url, locate_run
from training_lens.cli.missing_files import check_training, start_unsloth
from training_lens.cli.options import CommandOptions
from training_lens.cli.torchrun import run_on_processes
from training_lens.errors import ConfigurationError, TrainingError
from training_lens.utils.launch import is_launched

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig
    from training_lens.evaluation.verdict import Verdict
    from training_lens.runs.run_folder import RunFolder
    from training_lens.training.summary import TrainingSummary

STOPPED_BY_FINDING = 3  # the exit code of a run that lens.stop_on stopped; it is saved
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="RUN",
        help="Resume a run: its id or folder, an experiment (its last run), 'latest', or a place in a mirror "
        "(s3://...).",
    ),
]
VerifyResume = Annotated[
    bool,
    typer.Option(
        "--verify-resume",
        help="Train nothing to keep: a few steps straight and interrupted, compared bit by bit on this machine.",
    ),
]


def train(options: CommandOptions, resume: Resume = None, verify_resume: VerifyResume = False) -> None:
    """Fine-tune an adapter. Without settings: the embedded model on its instruction set.

    Examples: training-lens train model.id=path/to/model data.train=rows.jsonl data.val_ratio=0.1;
    training-lens train --resume latest; training-lens train --resume s3://bucket/path
    """
    with command(options, has_log=True) as screen:
        settings = load_config(options)
        unfinished = _find_unfinished(screen, resume, settings) if resume else _find_restarted(settings)
        if not unfinished:
            check_training(settings)
            distributed = settings.distributed
        else:
            from training_lens.config.run_config import read_run_config

            recorded = read_run_config(unfinished)
            start_unsloth(recorded)
            distributed = (settings if "distributed" in settings.explicit_values() else recorded).distributed
        if distributed.processes > 1 and not (is_launched() or verify_resume):
            raise typer.Exit(run_on_processes(distributed, sys.argv[1:]))
        if verify_resume:
            _verify_resume(screen, settings, resume)
            return
        from training_lens.evaluation.training_verdict import assess_training, read_training_record
        from training_lens.runs.run_folder import RunFolder
        from training_lens.training.run import TrainingWrapper

        if unfinished:
            summary = TrainingWrapper.resume(unfinished, settings.explicit_values(), console=screen.console)
        else:
            summary = TrainingWrapper(settings, console=screen.console).train()
        verdict = assess_training(read_training_record(RunFolder(Path(summary.run_dir))), summary.run_dir)
        _show_summary(screen, summary, verdict)
        screen.print_result({**asdict(summary), "verdict": verdict.as_json()})
        if summary.stopped_by:
            raise typer.Exit(STOPPED_BY_FINDING)


def _find_restarted(settings: TrainingConfig) -> RunFolder | None:
    """The run that goes on where torchrun started its processes anew."""
    if not is_launched():
        return None
    from training_lens.training.run_processes import find_restarted_run

    return find_restarted_run(settings)


def _verify_resume(screen: Screen, settings: TrainingConfig, resume: str | None) -> None:
    if resume is not None:
        raise ConfigurationError("--verify-resume tries a config on runs of its own; leave out --resume.")
    from training_lens.training.verify_resume import verify_resume

    check = verify_resume(settings, screen.console)
    screen.print_result(check.as_json())
    if not check.is_exact:
        raise TrainingError(
            f"resuming is not exact here: of {check.steps} steps, resumed after {check.resumed_after}, these differ: "
            f"{', '.join(check.different)}. Resumed runs are close to undisturbed ones, and not the same."
        )
    screen.print_line(
        f"exact: {check.steps} steps, interrupted after {check.resumed_after + 1} and resumed after "
        f"{check.resumed_after} in a fresh process, are bit for bit those that never stopped "
        f"({len(check.compared)} results compared)"
    )


def _find_unfinished(screen: Screen, reference: str, settings: TrainingConfig) -> RunFolder:
    """The run to resume; one in a mirror is fetched."""
    if not is_url(reference):
        return locate_run(reference, settings.output, finished=False)
    from training_lens.display.progress import Progress
    from training_lens.integrations.remote_run import fetch_to_resume

    run = fetch_to_resume(reference, settings.output.base_output_dir, Progress(screen.console))
    screen.print_line(f"fetched {run.root}")
    return run


def _show_summary(screen: Screen, summary: TrainingSummary, verdict: Verdict) -> None:
    from training_lens.utils.formatting import format_seconds, format_size

    show = screen.console.print
    rest = f" after {summary.steps} steps ({summary.epochs:.3g} epochs, {format_seconds(summary.seconds)})"
    end = f"stopped by {summary.stopped_by} (lens.stop_on)" if summary.stopped_by else "finished"
    show(Text.assemble((f"\n{end}", "bold"), rest))
    show(f"  training loss    {summary.train_loss:.4f} nats per supervised token")
    if summary.validation_loss is not None:
        show(f"  validation loss  {summary.validation_loss:.4f} at step {summary.adapter_step}")
    show(f"  speed            {summary.tokens_per_second:,.0f} tokens/s, peak memory {format_size(summary.peak_bytes)}")
    show(f"  saved in         {summary.run_dir}", soft_wrap=True)
    for line in verdict.text_lines():
        show(line, markup=False, soft_wrap=True)
