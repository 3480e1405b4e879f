"""What the lens saw of a run: its findings with evidence, measures by layer over steps, and spectra."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from training_lens.analysis.findings.finding import Finding
from training_lens.analyzers.module_groups import By, json_numbers, json_value, nan_median, read_evolution
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.display.downsampling import MOST_STEPS, thin_rows, thin_steps
from training_lens.evaluation.verdict import LEAST_CHANGE
from training_lens.utils.formatting import pluralize

LOGARITHMIC = ("step_ratio", "gradient_norm")  # their rows and steps differ by orders of magnitude
MEASURES: Mapping[str, tuple[str, str]] = {  # measure -> its name, and how to read it
    "strength": ("Update strength", "The size of the update relative to the weight that it changes, |dW| / |W|."),
    "step_ratio": ("Update of one step", "The change of the update in one step over the weight. It follows the rate."),
    "gradient_norm": (
        "Gradient norm",
        "Before clipping. Rows that differ by orders of magnitude learn at other speeds.",
    ),
    "spectra.effective_rank": ("Effective rank", "How many directions the update uses."),
    "optimizer_state.update_rms_b": (
        "Adam's update RMS",
        "About 1 in a calm run. Peaks often come before loss spikes.",
    ),
    "adapter_gradients.cosine_mean": (
        "Agreement with earlier gradients",
        "1: every step goes the same way. About 0: batches disagree, which is normal late in training.",
    ),
}
RUN_WORDS = {"analyze": (), "compare": ("--run",), "rank": ()}  # what stands before a command's run
COMMAND = re.compile(rf"training-lens ({'|'.join(RUN_WORDS)})\b([^;]*)")
PLACEHOLDER = re.compile(r"(training-lens \w+) RUN\b")
CONVERGED = ("Converged", "The held-out loss no longer falls")


def describe_findings(findings: tuple[Finding, ...], name: str) -> dict[str, Any]:
    """All checks of a run that commands call `name`, most severe first, and what they amount to in a phrase."""
    return {"phrase": summarize_findings(findings), "findings": [_describe_finding(each, name) for each in findings]}


def _describe_finding(finding: Finding, name: str) -> Any:
    advice = {key: name_run_in_advice(getattr(finding, key), name) for key in ("action", "decide")}
    return json_value({**asdict(finding), **advice, "command": find_command(finding, name)})


def summarize_findings(findings: tuple[Finding, ...]) -> str:
    """'nothing wrong found; you could stop at step 400', or what is wrong."""
    wrong = [finding for finding in findings if finding.severity in ("problem", "warning")]
    if wrong:
        more = f" and {pluralize(len(wrong) - 1, 'more problem')}" if len(wrong) > 1 else ""
        return f"{wrong[0].title[0].lower()}{wrong[0].title[1:]}{more}"
    unknown = sum(finding.confidence == "inconclusive" for finding in findings)
    if unknown == len(findings):
        return "too little was captured to find faults"
    checks = f" ({unknown} of {len(findings)} checks undecided)" if unknown else ""
    return f"nothing wrong found{checks}{_describe_stop(findings)}"


def _describe_stop(findings: tuple[Finding, ...]) -> str:
    """From which validated step on the held-out loss gained nothing that matters, of a run that has converged."""
    found = next((finding for finding in findings if finding.code == "converged"), None)
    if found is None or found.confidence == "inconclusive" or found.title not in CONVERGED:
        return ""
    held_out = found.evidence.get("held_out") or {"steps": [], "values": []}
    points = sorted(zip(held_out["steps"], held_out["values"], strict=True))
    best = min((loss for _, loss in points), default=0.0)
    step = next((step for step, loss in points if loss <= (1 + LEAST_CHANGE) * best), 0)
    return f"; you could stop at step {step:,}" if points and step < points[-1][0] else ""


def name_run_in_advice(text: str, name: str) -> str:
    """Advice with the run's own name in its commands, in place of RUN."""
    return PLACEHOLDER.sub(lambda found: f"{found[1]} {name}", text)


def find_command(finding: Finding, name: str) -> str:
    """The first command about the run in a finding's advice, which can be copied; empty without one.

    Args:
        name: what commands call the run.
    """
    for text in (finding.action, finding.decide):
        if found := COMMAND.search(text):
            return " ".join(["training-lens", found[1], *RUN_WORDS[found[1]], name, *_read_options(found[2])])
    return ""


def _read_options(text: str) -> Iterator[str]:
    """The options and settings that a command in a sentence begins with; the sentence goes on behind them."""
    is_value = False
    for word in text.removeprefix(" RUN").removeprefix(" with").split():
        bare = word.rstrip(",:.")
        if not (is_value or bare.startswith("--") or "=" in bare):
            return
        yield bare
        if bare != word:
            return
        is_value = bare.startswith("--")


def list_measures(recording: Recording) -> list[dict[str, str]]:
    """The measures that were captured, with what they mean."""
    found = []
    for measure, (title, meaning) in MEASURES.items():
        if len(read_evolution(recording, measure).steps):
            found.append({"measure": measure, "title": title, "meaning": meaning})
    return found


def describe_layers(recording: Recording, measure: str, by: By) -> dict[str, Any]:
    """A measure over steps by layer, module type or module: a column for each measured step, or for several.

    `values` is a row for each name; null where nothing finite was measured.
    """
    series = read_evolution(recording, measure, by)
    steps, values = thin_steps(series.steps, series.values.T)
    names, values = thin_rows(series.names, values)
    return {
        "measure": measure,
        "by": by,
        "is_log": measure in LOGARITHMIC,
        "measures": list_measures(recording),
        "steps": steps.tolist(),
        "steps_in_a_column": -(-len(series.steps) // MOST_STEPS) if len(series.steps) else 1,
        "names": [f"layer {name}" if by == "layer" and name[0].isdigit() else name for name in names],
        "values": [json_numbers(row) for row in values],
    }


def describe_spectra(recording: Recording) -> dict[str, Any]:
    """The singular values of the update at the last step that has them, by module type, relative to the largest."""
    if not recording.has(tables.SPECTRA, "singular_values"):
        return {"step": None, "kinds": {}}
    steps, vectors = recording.captures.vectors(tables.SPECTRA, "singular_values")
    kinds: dict[str, list[np.ndarray]] = {}
    for module in recording.modules:
        last = vectors[module.name][-1] if module.name in vectors else np.zeros(0)
        if len(last) and np.isfinite(last[0]) and last[0] > 0:
            kinds.setdefault(module.kind, []).append(last / last[0])
    return {"step": int(steps[-1]), "kinds": {kind: _average_spectra(spectra) for kind, spectra in kinds.items()}}


def _average_spectra(spectra: list[np.ndarray]) -> list[float | None]:
    """The median over modules of each direction's share of the largest."""
    longest = max(map(len, spectra))
    padded = np.full((longest, len(spectra)), np.nan)
    for column, values in enumerate(spectra):
        padded[: len(values), column] = values
    return json_numbers(nan_median(padded))
