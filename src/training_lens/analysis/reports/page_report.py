"""The dashboard's page of a run, or of a comparison, as one HTML file that opens offline: its values are inside."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any, get_args

from training_lens.analysis.checkpoint_analyzer import Analysis
from training_lens.analysis.page.lens_page import describe_findings, describe_layers, describe_spectra, list_measures
from training_lens.analysis.page.recorded_page import describe_recording
from training_lens.analysis.page.recording_cache import RecordingCache
from training_lens.analysis.page.run_compare import compare_layers, compare_runs
from training_lens.analysis.page.run_feed import FeedCache, RunFeed
from training_lens.analysis.page.run_page import describe_run, read_log_end
from training_lens.analyzers.module_groups import By, json_value
from training_lens.core.collector import AnalyzerRegistry
from training_lens.display.html import read_static
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import redact_for_file, replace_non_finite, write_text

MODULES = ("dom.js", "format.js", "theme.js", "api.js", "drawing.js", "chart.js", "heatmap.js", "report.js")
PAGES = ("pages/run.js", "pages/runs.js", "pages/compare.js")
PARTS = (
    "parts/actions.js",
    "parts/samples.js",
    "parts/curves.js",
    "parts/evaluation.js",
    "parts/explanations.js",
    "parts/findings.js",
    "parts/layers.js",
    "parts/next_steps.js",
)
IMPORT = re.compile(r'(from ")(\.[^"]+)(")')
POLICY = "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data:"
POINTS = 600  # of a curve
MOST_COLUMNS = 120  # steps of a heat map
DIGITS = 4  # of a number in a heat map
GROUPINGS: tuple[By, ...] = get_args(By)


def write_page_report(analysis: Analysis, path: Path) -> None:
    """Write the page of a run, atomically."""
    values = collect_page(analysis)
    headline = values["page"]["headline"]["verdict"]["sentence"]
    _write_page(path, f"Run {analysis.recording.name}", headline, values)


def write_comparison_page(runs: Sequence[RunFolder], path: Path) -> None:
    """Write the page of a comparison of runs, atomically; errors are those of `compare_runs`."""
    values = {"comparison": compare_runs(runs, FeedCache()), "layers": compare_layers(runs, RecordingCache())}
    names = " and ".join(run.run_id for run in runs)
    _write_page(path, names, f"{len(runs)} runs side by side.", values)


def _write_page(path: Path, title: str, headline: str, values: Mapping[str, Any]) -> None:
    write_text(path, render_page_report(title, headline, redact_for_file(_dump(values), path)), verbatim=True)


def collect_page(analysis: Analysis) -> dict[str, Any]:
    """All values that the page shows. What grows with the run is thinned: curves keep their minima and maxima."""
    recording = analysis.recording
    run = RunFolder(recording.folder)
    if (run.metadata / "summary.json").is_file():
        feed = RunFeed(run).refresh()
        page, log = describe_run(run, feed), read_log_end(run)
        curves = {"last_step": feed.last_step, "curves": feed.thin_curves(POINTS), "validations": feed.validations}
    else:
        page, curves, log = *describe_recording(recording, POINTS), ""
    measures = [measure["measure"] for measure in list_measures(recording)]
    layers = {
        by: {measure: _thin_layers(describe_layers(recording, measure, by)) for measure in measures} for by in GROUPINGS
    }
    return {
        "page": page,
        "curves": curves,
        "findings": describe_findings(analysis.findings, page["name"]),
        "layers": layers,
        "spectra": describe_spectra(recording),
        "log": log,
        "own_results": json_value(_own_results(analysis)),
    }


def _own_results(analysis: Analysis) -> dict[str, Any]:
    """What analyzers of the user found."""
    ours = {
        name for name in AnalyzerRegistry.names() if AnalyzerRegistry.get(name).__module__.startswith("training_lens.")
    }
    return {name: values for name, values in analysis.results.items() if name not in ours}


def _thin_layers(found: dict[str, Any]) -> dict[str, Any]:
    """Fewer columns with fewer digits: each column still is one that was measured."""
    every = -(-len(found["steps"]) // MOST_COLUMNS) or 1
    chosen = range(len(found["steps"]) - 1, -1, -every)[::-1]
    values = [[_round(row[i]) for i in chosen] for row in found["values"]]
    return {**found, "steps": [found["steps"][i] for i in chosen], "values": values}


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def render_page_report(title: str, headline: str, values: str) -> str:
    """The HTML of a page with these values, JSON without '<', '>' and '&'. Title and headline need no script."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<title>{escape(title)}</title>
<style>{read_static("vendor/uPlot.min.css")}{read_static("parts.css")}{read_static("style.css")}</style>
<script>{read_static("vendor/uPlot.iife.min.js")}</script>
<script type="importmap">{_import_map()}</script>
</head><body>
<header class="top"><span class="brand">Training Lens</span><span class="spread"></span>
<button id="theme" type="button" class="quiet">Dark</button></header>
<main id="main" tabindex="-1"><h1>{escape(title)}</h1><p>{escape(headline)}</p>
<noscript><p>The rest of this report needs JavaScript; it is in this file and loads nothing.</p></noscript></main>
<script type="application/json" id="values">{values}</script>
<script type="module">import {{ showReport }} from "lens/report.js"; showReport();</script>
</body></html>
"""


def _dump(values: Mapping[str, Any]) -> str:
    """JSON that stays inside of a script element, whatever its texts hold."""
    text = json.dumps(replace_non_finite(dict(values)), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _import_map() -> str:
    """The modules of the page by name, each as its own text."""
    modules = {f"lens/{name}": _encode(name) for name in (*MODULES, *PAGES, *PARTS)}
    return json.dumps({"imports": modules}, separators=(",", ":"))


def _encode(name: str) -> str:
    """A module as a data address. Its imports are by name there, as such an address has no folder."""
    text = IMPORT.sub(
        lambda found: f"{found[1]}lens/{normpath(join(dirname(name), found[2]))}{found[3]}", read_static(name)
    )
    return f"data:text/javascript;base64,{base64.b64encode(text.encode()).decode()}"
