"""What a sweep leaves in its folder: leaderboard.json, best.yaml for `train --config`, and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState

from training_lens.config.schema import TrainingConfig
from training_lens.sweeps.leaderboard import Leaderboard, Row
from training_lens.sweeps.proposals import study_of
from training_lens.utils.files import write_json, write_text
from training_lens.utils.pages import Table, write_page

LOSS = "validation loss"

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def write_results(
    folder: Path, found: Leaderboard, trials: Sequence[FrozenTrial], config: TrainingConfig
) -> dict[str, str]:
    """Write the sweep's files; gives their paths by name. best.yaml only where a trial finished.

    Args:
        trials: those that count, for the plots.
        config: the base of the trials.
    """
    files = {name: str(folder / name) for name in ("leaderboard.json", "report.html")}
    write_json(folder / "leaderboard.json", found.as_json())
    write_page(folder / "report.html", f"Sweep {found.study}", [*_tables(found), *_figures(trials)])
    if found.best is not None:
        files["best.yaml"] = str(folder / "best.yaml")
        write_text(folder / "best.yaml", _best_yaml(found, found.best, config))
    return files


def _best_yaml(found: Leaderboard, best: Row, config: TrainingConfig) -> str:
    """The base config as it was given, with the best trial's values; where runs go is left to whoever trains it."""
    values = config.given()
    del values["sweep"]
    values["output"].pop("run_id", None)
    for key, value in best.params.items():
        section, name = key.split(".")
        values[section][name] = value
    head = (
        f"# Trial {best.trial} of the sweep '{found.study}': {found.metric} {best.validation_loss:.4f}, "
        f"the best of {found.count('finished')} finished trials.\n# Train it: training-lens train --config best.yaml\n"
    )
    return head + yaml.safe_dump(_without_empty(values), sort_keys=False)


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    """Nested sections without those that hold nothing."""
    inner = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if value != {}}


def _tables(found: Leaderboard) -> list[str | Table]:
    counts = [f"{found.count(state)} {state}" for state in ("finished", "pruned", "running", "stopped", "failed")]
    parts: list[str | Table] = [
        f"{', '.join(text for text in counts if not text.startswith('0 '))} of {len(found.rows)} trials. Losses are in "
        "nats per supervised token on the validation rows; lower is better.",
        leaderboard_table(found),
    ]
    if found.importances:
        rows = [(key, f"{share:.0%}") for key, share in found.importances.items()]
        parts.append(Table("how much each key mattered for being among the best (PED-ANOVA)", ("key", "share"), rows))
    return parts


def leaderboard_table(found: Leaderboard) -> Table:
    """The leaderboard as text: trial, loss, a column for each key, seconds, state, run."""
    keys = list(dict.fromkeys(key for row in found.rows for key in row.params))
    rows = [
        (
            str(row.trial),
            "-" if row.validation_loss is None else f"{row.validation_loss:.4f}",
            *(shown(row.params.get(key)) for key in keys),
            "-" if row.seconds is None else f"{row.seconds:.1f}",
            row.state,
            row.run_id,
        )
        for row in found.rows
    ]
    return Table("best first", ("trial", LOSS, *keys, "seconds", "state", "run"), rows)


def shown(value: Any) -> str:
    """A value of the config in a table: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(trials: Sequence[FrozenTrial]) -> list[str | Table | Figure]:
    """History, slices, parallel coordinates and validations of the trials that have a loss."""
    judged = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if sum(trial.state == TrialState.COMPLETE for trial in judged) < 2:
        return []
    study = study_of(judged)
    figures: list[str | Table | Figure] = [
        "# Trial after trial", visualization.plot_optimization_history(study, target_name=LOSS),
        "# Each key by itself", visualization.plot_slice(study, target_name=LOSS),
        "# Keys together", visualization.plot_parallel_coordinate(study, target_name=LOSS),
    ]  # fmt: skip
    if any(len(trial.intermediate_values) > 1 for trial in judged):
        figures += ["# Within the trials", visualization.plot_intermediate_values(study)]
    return figures
