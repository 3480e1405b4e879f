"""The files of a sweep: leaderboard.json, best.yaml for `train --config`, and report.html."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from training_lens.config.schema import TrainingConfig
from training_lens.display.colors import COLOURS
from training_lens.display.html import Part, SvgPicture, Table, write_page
from training_lens.display.svg import Curve, render_chart
from training_lens.runs.metrics_log import is_finite_number
from training_lens.sweeps.leaderboard import STATE_ORDER, Leaderboard, Recommendation
from training_lens.sweeps.trials import first_number
from training_lens.utils.files import write_json, write_text

LOSS = "validation loss"
LOG_RATIO = 10  # from this ratio of largest to smallest value on, a key's axis is logarithmic
MOST_CURVES = 8  # of trials in one picture


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
    """The leaderboard as text: trial, loss, one column per key, seconds, state, machine if there are several, run."""
    keys = list(dict.fromkeys(key for row in found.rows for key in row.params))
    machines = ["machine"] if len({row.host for row in found.rows}) > 1 else []
    rows = [
        (
            f"{row.trial} (default)" if row.is_default else str(row.trial),
            "-" if row.validation_loss is None else f"{row.validation_loss:.4f}",
            *(format_value(row.params.get(key)) for key in keys),
            "-" if row.seconds is None else f"{row.seconds:.1f}",
            row.state,
            *(row.host or "-" for _ in machines),
            row.run_id,
        )
        for row in found.rows
    ]
    return Table("best first", ("trial", LOSS, *keys, "seconds", "state", *machines, "run"), rows)


def format_value(value: Any) -> str:
    """A config value in a table: floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _build_figures(found: Leaderboard, trials: Sequence[FrozenTrial]) -> Iterator[Part]:
    """Importances, the losses in the order of the trials, by key, and within the trials."""
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    if sum(bool(trial.params) for trial in done) < 2:
        return
    if found.importances:
        yield "# Importance of each key"
        shares = [(key, f"{share:.0%}") for key, share in found.importances.items()]
        yield Table("for being among the best quarter (PED-ANOVA, shares of 1)", ("key", "share"), shares)
    yield "# Losses in the order of the trials"
    yield _draw_history(done)
    yield "# Loss by key"
    yield from _draw_keys([trial for trial in done if trial.params])
    if curves := _collect_curves(trials):
        yield "# Validation losses within the trials"
        yield SvgPicture(
            render_chart(curves, "step", LOSS), f"The {len(curves)} best trials that were validated twice."
        )


def _draw_history(trials: Sequence[FrozenTrial]) -> SvgPicture:
    ordered = sorted(trials, key=first_number)
    numbers = np.array([first_number(trial) for trial in ordered], float)
    losses = np.array([trial.value for trial in ordered], float)
    best = np.minimum.accumulate(losses)
    curves = [
        Curve("a trial", numbers, losses, COLOURS[0], is_marked=True),
        Curve("the best so far", numbers, best, COLOURS[1]),
    ]
    return SvgPicture(render_chart(curves, "trial", LOSS), "Lower is better.")


def _draw_keys(trials: Sequence[FrozenTrial]) -> Iterator[Part]:
    """A picture for each key with numbers, and a table for each with words."""
    for key in dict.fromkeys(key for trial in trials for key in trial.params):
        points = [(trial.params[key], float(trial.value or 0.0)) for trial in trials if key in trial.params]
        values, losses = zip(*points, strict=True)
        if all(is_finite_number(value) for value in values) and len(set(values)) > 1:
            is_log = min(values) > 0 and max(values) >= LOG_RATIO * min(values)
            marks = Curve("a trial", np.array(values, float), np.array(losses), COLOURS[0], is_marked=True)
            yield SvgPicture(render_chart([marks], key, LOSS, log_x=is_log), "")
        else:
            yield _tabulate_key(key, points)


def _tabulate_key(key: str, points: Sequence[tuple[Any, float]]) -> Table:
    groups: dict[str, list[float]] = {}
    for value, loss in points:
        groups.setdefault(format_value(value), []).append(loss)
    rows = [
        (value, str(len(losses)), f"{min(losses):.4f}", f"{median(losses):.4f}")
        for value, losses in sorted(groups.items(), key=lambda item: min(item[1]))
    ]
    return Table(key, ("value", "trials", "best loss", "median loss"), rows)


def _collect_curves(trials: Sequence[FrozenTrial]) -> list[Curve]:
    """The validation losses of the best trials that have several."""
    several = [trial for trial in trials if len(trial.intermediate_values) > 1]
    several.sort(key=lambda trial: min(trial.intermediate_values.values()))
    return [
        Curve(
            f"trial {first_number(trial)}",
            np.array(list(trial.intermediate_values), float),
            np.array(list(trial.intermediate_values.values()), float),
            COLOURS[i % len(COLOURS)],
            dashed=i >= len(COLOURS),
        )
        for i, trial in enumerate(several[:MOST_CURVES])
    ]
