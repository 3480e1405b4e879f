"""What a sweep leaves in its folder: leaderboard.json, best.yaml for `train --config`, and report.html."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from optuna import Study, visualization
from optuna.trial import FrozenTrial, TrialState, create_trial

from training_lens.config.schema import TrainingConfig
from training_lens.sweeps.leaderboard import ORDER, Leaderboard, Row
from training_lens.sweeps.proposals import study_of
from training_lens.sweeps.trials import first_number
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
    if found.best is not None:
        files["best.yaml"] = str(folder / "best.yaml")
        write_text(folder / "best.yaml", best_yaml(found, found.best, config))
    parts = [_summary(found), leaderboard_table(found), *_figures(found, trials)]
    write_page(folder / "report.html", f"Sweep {found.study}", parts)  # last: of plots that fail, the rest is there
    return files


def best_yaml(found: Leaderboard, best: Row, config: TrainingConfig) -> str:
    """The base config as it was given, with the best trial's values, for `compose` to read back as it is."""
    values = config.given()
    del values["sweep"]
    values["output"].pop("run_id", None)
    for key, value in best.params.items():
        section, name = key.split(".")
        values[section][name] = value
    head = (
        f"# Trial {best.trial} of the sweep {json.dumps(found.study)}: {found.metric} {best.validation_loss:.4f}, "
        f"the best of {found.count('finished')} finished trials.\n# Train it: training-lens train --config best.yaml\n"
    )
    return head + OmegaConf.to_yaml(_escaped(_without_empty(values)))


def _escaped(value: Any) -> Any:
    """`value` with each `${` in its texts as itself: it would be read as an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    """Nested sections without those that hold nothing."""
    inner = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if value != {}}


def _summary(found: Leaderboard) -> str:
    counts = [f"{found.count(state)} {state}" for state in ORDER if found.count(state)]
    return (
        f"{len(found.rows)} trials: {', '.join(counts)}. Losses are in nats per supervised token on the validation "
        "rows; lower is better."
    )


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


def _figures(found: Leaderboard, trials: Sequence[FrozenTrial]) -> list[str | Table | Figure]:
    """Importances, history, slices, parallel coordinates, and validations of the trials that have a loss."""
    if found.count("finished") < 2:
        return []
    study = _numbered(trials)
    figures = {
        "Trial after trial": visualization.plot_optimization_history(study, target_name=LOSS),
        "Each key by itself": visualization.plot_slice(study, target_name=LOSS),
        "Keys together": visualization.plot_parallel_coordinate(study, target_name=LOSS),
    }
    if found.importances:
        title = "How much each key mattered for being among the best quarter (PED-ANOVA, shares of 1)"
        figures = {title: _bars(found.importances), **figures}
    if any(len(trial.intermediate_values) > 1 for trial in trials):
        figures["Within the trials, validation after validation"] = visualization.plot_intermediate_values(study)
    return [part for title, figure in figures.items() for part in (f"# {title}", figure.update_layout(title=None))]


def _numbered(trials: Sequence[FrozenTrial]) -> Study:
    """The trials as a study in memory, each by the number that the leaderboard has; what lies between is left out."""
    by_number = {first_number(trial): trial for trial in trials}
    nothing = create_trial(state=TrialState.FAIL)
    return study_of([by_number.get(number, nothing) for number in range(max(by_number) + 1)])


def _bars(shares: Mapping[str, float]) -> Figure:
    from plotly.graph_objects import Bar, Figure

    upwards = list(shares.items())[::-1]
    bars = Bar(x=[share for _, share in upwards], y=[key for key, _ in upwards], orientation="h")
    return Figure(bars).update_layout(height=180 + 30 * len(shares))
