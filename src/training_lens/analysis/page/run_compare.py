"""Several runs side by side: curves, settings that differ, evaluations, layers and sample answers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from training_lens.analysis.page.recording_cache import RecordingCache
from training_lens.analysis.page.run_feed import FeedCache
from training_lens.analysis.page.run_page import arrange_samples, describe_evaluation, read_comparison_report
from training_lens.analysis.page.run_row import read_run_row
from training_lens.errors import ConfigurationError, LensError, TrainingLensError
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_listing import config_differences, have_same_validation, read_run
from training_lens.runs.run_lookup import name_run

POINTS = 400  # of a curve
MOST_RUNS = 6
MOST_MODULES = 12  # whose updates differ the most


def compare_runs(runs: Sequence[RunFolder], feeds: FeedCache) -> dict[str, Any]:
    """What the page of a comparison shows without the captures, as JSON.

    Raises:
        ConfigurationError: there are fewer than two runs, or too many to stand side by side.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise ConfigurationError(
            f"a comparison needs 2 to {MOST_RUNS} runs; {len(runs) or 'none'} given. Choose them in the list of runs."
        )
    listed = [read_run(run) for run in runs]
    return {
        "runs": [_describe_side(run, feeds) for run in runs],
        "differences": [
            {"key": key, "values": list(values)} for key, values in sorted(config_differences(listed).items())
        ],
        "same_validation": have_same_validation(listed),
    }


def _describe_side(run: RunFolder, feeds: FeedCache) -> dict[str, Any]:
    feed = feeds.open_feed(run)
    return {
        "row": asdict(read_run_row(run)),
        "name": shlex.quote(name_run(run)),
        "curves": feed.thin_curves(POINTS),
        "validations": [
            {key: line.get(key) for key in ("kind", "step", "loss")} for line in feed.validations if line.get("loss")
        ],
        "evaluation": describe_evaluation(read_comparison_report(run)),
        "samples": arrange_samples(feed.samples),
    }


def compare_layers(runs: Sequence[RunFolder], recordings: RecordingCache) -> dict[str, Any]:
    """The update of each layer at the end of each run, and, for two runs, how alike their updates are."""
    sides = [_last_strengths(run, recordings) for run in runs]
    names = list(dict.fromkeys(name for side in sides for name in side["values"]))
    return {
        "names": names,
        "runs": [{"step": side["step"], "values": [side["values"].get(name) for name in names]} for side in sides],
        "similarity": _compare_updates(runs, recordings) if len(runs) == 2 else None,
    }


def _last_strengths(run: RunFolder, recordings: RecordingCache) -> dict[str, Any]:
    from training_lens.analyzers.module_groups import latest_values, read_evolution

    try:
        series = read_evolution(recordings.open(run), "strength", "layer")
    except TrainingLensError:  # nothing was captured: the page shows no bars of this run
        return {"step": None, "values": {}}
    return {"step": int(series.steps[-1]) if len(series.steps) else None, "values": latest_values(series)}


def _compare_updates(runs: Sequence[RunFolder], recordings: RecordingCache) -> dict[str, Any]:
    """The cosine of the updates of each module, those that differ the most first; or why they cannot be compared."""
    from training_lens.analysis.checkpoint_analyzer import compare_adapters

    try:
        found = compare_adapters(recordings.open(runs[0]), recordings.open(runs[1]))
    except LensError as error:
        return {"reason": str(error)}
    cosines = {name: one.cosine for name, one in found.modules.items() if math.isfinite(one.cosine)}
    values = found.values()
    least = sorted(cosines, key=cosines.__getitem__)[:MOST_MODULES]
    return {
        "median_cosine": values["median_cosine"],
        "modules": [{"name": name, "cosine": cosines[name]} for name in least],
        "only_first": values["only_first"],
        "only_second": values["only_second"],
    }
