"""`training-lens sweep`: many trials, and which settings are best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training_lens.cli.common import Screen, command, load_config, show_table
from training_lens.cli.missing_files import check_training
from training_lens.cli.options import CommandOptions
from training_lens.errors import TrainingError

if TYPE_CHECKING:
    from training_lens.sweeps.leaderboard import Leaderboard, TrialRow
    from training_lens.sweeps.runner import SweepResult


def sweep(options: CommandOptions) -> None:
    """Search for the best settings: many trials, each a normal run, compared by validation loss.

    Stopped or killed, the same command continues it; started several times at once, the processes share the trials.

    Examples: training-lens sweep sweep=lr; training-lens sweep sweep.name=mine sweep.space.peft.r=[4,8,16]
    """
    with command(options, has_log=True) as screen:
        settings = load_config(options)
        check_training(settings)
        from training_lens.sweeps.runner import Sweep

        result = Sweep(settings, console=screen.console, on_trial=lambda row: _show_trial(screen, row)).run()
        _show_result(screen, result)
        if result.leaderboard.best is None and not result.leaderboard.count_trials("running"):
            raise TrainingError(_describe_failures(result.leaderboard))
        screen.print_result(_as_json(result))


def _as_json(result: SweepResult) -> dict[str, object]:
    board, best = result.leaderboard, result.leaderboard.best
    found = best and {
        "trial": best.trial,
        "value": best.validation_loss,
        "params": best.params,
        "run_dir": best.run_dir,
        "host": best.host,
    }
    return {
        "study": board.study,
        "metric": board.metric,
        **{state: board.count_trials(state) for state in ("finished", "pruned", "failed", "running", "stopped")},
        "best": found,
        "recommended": result.recommendation and result.recommendation.as_json(),
        "importances": board.importances,
        "files": result.files,
    }


def _describe_failures(board: Leaderboard) -> str:
    errors = {row.error: row.run_id for row in board.rows if row.error}
    failures = "; ".join(f"{run_id}: {error}" for error, run_id in errors.items())
    return f"no trial of the sweep '{board.study}' finished. {failures}"


def _show_trial(screen: Screen, row: TrialRow) -> None:
    """Print a line when a trial ends."""
    from training_lens.sweeps.sweep_report import format_value

    ends = {"finished": f"validation loss {row.validation_loss or 0:.4f}", "failed": f"failed: {row.error}"}
    reached = "" if row.validation_loss is None else f" at {row.validation_loss:.4f}"
    end = ends.get(row.state, f"{row.state}{reached}")
    params = " ".join(f"{key}={format_value(value)}" for key, value in row.params.items())
    name = f"{row.trial} (default settings)" if row.is_default else row.trial
    screen.print_line(f"trial {name}: {end}  {params}")


def _show_result(screen: Screen, result: SweepResult) -> None:
    """Print the leaderboard, the importance of the settings, and the files."""
    from training_lens.sweeps.sweep_report import format_sentence, leaderboard_table

    board = result.leaderboard
    found = leaderboard_table(board)
    title, numbers = f"sweep {board.study}, {found.caption}", set(found.columns) - {"state", "machine", "run"}
    show_table(screen.console, title, found.columns, found.rows, right=numbers)
    if result.recommendation and result.recommendation.reason:
        screen.print_line(format_sentence(result.recommendation.reason))
    if board.importances:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in board.importances.items())
        screen.print_line(f"what mattered  {shares}")
    if board.count_trials("running"):
        others = board.count_trials("running")
        screen.console.print(f"{others} trials still run in other processes; the last of them writes the whole result")
    for name, path in result.files.items():
        screen.print_line(f"{name:<17} {path}")
