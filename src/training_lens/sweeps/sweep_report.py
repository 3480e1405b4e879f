"""The files of a sweep: leaderboard.json, best.yaml for `train --config`, and report.html."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from optuna import Study, visualization
from optuna.trial import FrozenTrial, TrialState, create_trial

from training_lens.config.schema import TrainingConfig
from training_lens.display.html import Table, write_page
from training_lens.sweeps.leaderboard import STATE_ORDER, Leaderboard, Recommendation
from training_lens.sweeps.search_strategies import build_study
from training_lens.sweeps.trials import first_number
from training_lens.utils.files import write_json, write_text

LOSS = "validation loss"

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def write_results(
    folder: Path,
    found: Leaderboard,
    chosen: Recommendation | None,
    trials: Sequence[FrozenTrial],
    config: TrainingConfig,
) -> dict[str, str]:
    """Write the sweep's files, with plots of the current trials, and return their paths by name.

    best.yaml, from the base config of the trials, needs a finished one.
    """
    files = {name: str(folder / name) for name in ("leaderboard.json", "report.html")}
    write_json(folder / "leaderboard.json", {**asdict(found), "recommended": chosen and chosen.as_json()})
    if chosen is not None:
        files["best.yaml"] = str(folder / "best.yaml")
        write_text(folder / "best.yaml", best_yaml(found, chosen, config))
    reason = [format_sentence(chosen.reason)] if chosen and chosen.reason else []
    counts = [f"{count} {state}" for state in STATE_ORDER if (count := found.count_trials(state))]
    summary = (
        f"{len(found.rows)} trials: {', '.join(counts)}. Losses are in nats per supervised token on the validation "
        "rows; lower is better."
    )
    parts = [summary, *reason, leaderboard_table(found), *_build_figures(found, trials)]
    write_page(folder / "report.html", f"Sweep {found.study}", parts)  # last: if a plot fails, the other files exist
    return files


def best_yaml(found: Leaderboard, chosen: Recommendation, config: TrainingConfig) -> str:
    """The given base config with the recommended trial's values, in a form that `compose` reads back unchanged."""
    values, row = config.explicit_values(), chosen.row
    del values["sweep"]
    values["output"].pop("run_id", None)
    for key, value in () if row.is_default else row.params.items():
        section, name = key.split(".")
        values[section][name] = value
    best = "the default settings"
    if row is found.best:
        best = f"the best of {found.count_trials('finished')} finished trials"
    head = [
        f"Trial {row.trial} of the sweep {json.dumps(found.study)}: {found.metric} {row.validation_loss:.4f}, {best}.",
        *([format_sentence(chosen.reason)] if chosen.reason else []),
        "Train it: training-lens train --config best.yaml",
    ]
    return "".join(f"# {line}\n" for line in head) + OmegaConf.to_yaml(_escape_interpolation(_drop_empty(values)))


def format_sentence(reason: str) -> str:
    """A reason as a full sentence."""
    return f"{reason[:1].upper()}{reason[1:]}."


def _escape_interpolation(value: Any) -> Any:
    """`value` with each `${` escaped, which would be read as an interpolation."""
    if isinstance(value, dict):
        return {key: _escape_interpolation(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape_interpolation(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _drop_empty(values: dict[str, Any]) -> dict[str, Any]:
    """Nested sections without the empty ones."""
    inner = {key: _drop_empty(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if value != {}}


def leaderboard_table(found: Leaderboard) -> Table:
    """The leaderboard as text: trial, loss, one column per key, seconds, state, run."""
    keys = list(dict.fromkeys(key for row in found.rows for key in row.params))
    rows = [
        (
            f"{row.trial} (default)" if row.is_default else str(row.trial),
            "-" if row.validation_loss is None else f"{row.validation_loss:.4f}",
            *(format_value(row.params.get(key)) for key in keys),
            "-" if row.seconds is None else f"{row.seconds:.1f}",
            row.state,
            row.run_id,
        )
        for row in found.rows
    ]
    return Table("best first", ("trial", LOSS, *keys, "seconds", "state", "run"), rows)


def format_value(value: Any) -> str:
    """A config value in a table: floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _build_figures(found: Leaderboard, trials: Sequence[FrozenTrial]) -> list[str | Table | Figure]:
    """Importances, history, slices, parallel coordinates, and the validation curves of the trials."""
    from plotly.graph_objects import Bar, Figure

    if sum(trial.state == TrialState.COMPLETE and bool(trial.params) for trial in trials) < 2:
        return []
    study, points = _number_trials(trials), _number_trials([trial for trial in trials if trial.params])
    figures = {
        "Optimization history": visualization.plot_optimization_history(study, target_name=LOSS),
        "Loss by key": visualization.plot_slice(points, target_name=LOSS),
        "Parallel coordinates": visualization.plot_parallel_coordinate(points, target_name=LOSS),
    }
    if found.importances:
        title = "Importance of each key for being among the best quarter (PED-ANOVA, shares of 1)"
        upwards = dict(list(found.importances.items())[::-1])
        bars = Bar(x=list(upwards.values()), y=list(upwards), orientation="h")
        figures = {title: Figure(bars).update_layout(height=180 + 30 * len(upwards)), **figures}
    if any(len(trial.intermediate_values) > 1 for trial in trials):
        figures["Validation losses within the trials"] = visualization.plot_intermediate_values(study)
    return [part for title, figure in figures.items() for part in (f"# {title}", figure.update_layout(title=None))]


def _number_trials(trials: Sequence[FrozenTrial]) -> Study:
    """The trials as an in-memory study with the numbers of the leaderboard; gaps are filled with failed trials."""
    by_number = {first_number(trial): trial for trial in trials}
    nothing = create_trial(state=TrialState.FAIL)
    return build_study([by_number.get(number, nothing) for number in range(max(by_number) + 1)])
