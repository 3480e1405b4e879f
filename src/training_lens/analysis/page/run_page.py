"""What the page of one run shows besides its curves: headline, progress, answers, evaluation, settings, files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from training_lens.analysis.page.explanations import describe_explanations
from training_lens.analysis.page.next_steps import list_next_steps
from training_lens.analysis.page.run_feed import RunFeed, list_active_findings
from training_lens.analysis.page.run_row import find_total_steps, read_run_row
from training_lens.config.schema import TrainingConfig
from training_lens.errors import CheckpointError
from training_lens.evaluation.training_verdict import (
    TrainingRecord,
    assess_training,
    build_training_record,
    read_comparison_verdict,
)
from training_lens.evaluation.verdict import (
    PERCENT_MEASURES,
    Outcome,
    Verdict,
    format_measure,
    name_measure,
    next_command,
)
from training_lens.runs.checkpoint_format import list_checkpoint_steps
from training_lens.runs.metrics_log import is_finite_number
from training_lens.runs.run_folder import PROCESS, RunFolder
from training_lens.runs.run_lookup import name_run
from training_lens.utils.files import list_files
from training_lens.utils.formatting import pluralize
from training_lens.utils.integrity import read_sealed
from training_lens.utils.limits import read_text_end
from training_lens.utils.nested import find_differences, flatten_sections

OUTCOMES: Mapping[Outcome, str] = {
    "better": "Better than the base",
    "worse": "Worse than the base",
    "no difference": "No better than the base",
    "inconclusive": "Not yet decided whether it is better than the base",
}
ANSWER_SCORES = ("exact_match", "numeric", "json_fields", "token_f1", "rougeL", "chrf", "bleu")  # the plainest first
SHOWN_MEASURES = ("loss", *ANSWER_SCORES[:4], "rougeL", "chrf", "token_accuracy", "forward_kl")
LOG_BYTES = 1 << 16  # of the end of run.log
LINE_BYTES = 1 << 12  # of it, for its last line
LOG_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (?:DEBUG|INFO|WARNING) (?P<text>.+)")
SHOWN_FOLDERS = ("reports", "logs", "metadata", "artifacts")


def describe_run(run: RunFolder, feed: RunFeed) -> dict[str, Any]:
    """The values of a run's page, as JSON."""
    row = read_run_row(run)
    config = read_config(run)
    verdict, name = assess_feed(run, feed), shlex.quote(name_run(run))
    report = read_comparison_report(run)
    return {
        "row": asdict(row),
        "headline": describe_headline(verdict, report, feed),
        "progress": describe_progress(run, feed, config),
        "active_findings": [dict(line) for line in list_active_findings(feed.findings)],
        "samples": arrange_samples(feed.samples),
        "evaluation": describe_evaluation(report),
        "settings": describe_settings(config),
        "data": describe_data(_read_json(run, "data.json")),
        "environment": _read_json(run, "environment.json"),
        "events": list_events(run, feed),
        "explanations": describe_explanations(run),
        "files": list(list_run_files(run)),
        "folder": str(run.root),
        "name": name,
        "next_steps": [asdict(step) for step in list_next_steps(name, row.status, verdict)],
    }


def _read_json(run: RunFolder, name: str) -> dict[str, Any]:
    """A file of the run's metadata; empty where it cannot be read, which `detail` of its row tells."""
    try:
        values = run.read_metadata(name)
    except (CheckpointError, OSError):
        return {}
    return values if isinstance(values, dict) else {}


def read_config(run: RunFolder) -> dict[str, Any]:
    """The run's settings by dotted key."""
    return flatten_sections(_read_json(run, "config.json"))


def read_comparison_report(run: RunFolder) -> dict[str, Any]:
    """What `compare` measured; empty without it, or where it is damaged."""
    try:
        return read_sealed(run.reports / "compare.json")
    except (CheckpointError, OSError):
        return {}


def assess_feed(run: RunFolder, feed: RunFeed) -> Verdict:
    """The verdict of `compare` unless the run was trained further since, else of its validations so far."""
    compared, name = read_comparison_verdict(run), name_run(run)
    if compared is None:
        return assess_training(build_record(feed), name)
    return replace(compared, next_command=next_command(compared, name))


def build_record(feed: RunFeed) -> TrainingRecord:
    steps, losses = feed.read_columns("step", "loss")
    known = [line for line in feed.validations if is_finite_number(line.get("loss"))]
    base = next((line["loss"] for line in known if line["kind"] == "base"), None)
    validated = [(line["step"], line["loss"]) for line in known if line["kind"] == "validation"]
    return build_training_record(steps.astype(int).tolist(), losses[np.isfinite(losses)].tolist(), base, validated)


def describe_headline(verdict: Verdict, report: Mapping[str, Any], feed: RunFeed) -> dict[str, Any]:
    """The verdict as a phrase with its numbers, and the verdict itself."""
    evidence = _describe_scores(verdict, report) if verdict.basis == "comparison" else _describe_losses(feed)
    phrase = OUTCOMES[verdict.outcome]
    return {"phrase": f"{phrase}: {evidence}" if evidence else phrase, "verdict": verdict.as_json()}


def _describe_scores(verdict: Verdict, report: Mapping[str, Any]) -> str:
    """'exact match 0.0% to 91.2% on 330 held-out rows': the plainest measure that changed as the verdict says."""
    sides = [report.get(side) or {} for side in ("base", "adapter")]
    for measure in (*ANSWER_SCORES, verdict.measure or "loss"):
        before, after = (side.get(measure) for side in sides)
        if not (is_finite_number(before) and is_finite_number(after)):
            continue
        if measure == verdict.measure or (after > before) == (verdict.outcome == "better"):
            change = f"{name_measure(measure)} {format_measure(measure, before)} to {format_measure(measure, after)}"
            return f"{change} on {pluralize(verdict.rows, 'held-out row')}"
    return ""


def _describe_losses(feed: RunFeed) -> str:
    record = build_record(feed)
    if record.base_loss is None or record.best_loss is None:
        return ""
    losses = f"{record.base_loss:.3f} to {record.best_loss:.3f}"
    return f"validation loss {losses} (step {record.best_step}), without an interval"


def describe_progress(run: RunFolder, feed: RunFeed, config: Mapping[str, Any]) -> dict[str, Any]:
    """Steps, speed and the remaining seconds, measured over the last steps, validations between them included.

    `is_starting`: the process that trains has done no step yet, also one that resumes; `doing` is then the last line
    that it logged.
    """
    steps, started = feed.columns["step"], _read_process_time(run)
    last = [{"kind": "step", "step": int(steps[-1]), "epoch": feed.columns["epoch"][-1]}] if steps else []
    total, speed = find_total_steps(config, last), feed.measure_speed(started)
    remaining = (total - feed.last_step) * speed["step_seconds"] if total and "step_seconds" in speed else None
    summary = _read_json(run, "summary.json")
    is_starting = summary.get("status") == "running" and (not steps or feed.columns["time"][-1] < started)
    kept = ("peak_bytes", "trainable_parameters", "total_parameters", "adapter_step", "lens_seconds", "stopped_by")
    return {
        "step": feed.last_step,
        "total_steps": total,
        "remaining_seconds": remaining,
        "is_starting": is_starting,
        "doing": _read_last_line(run, started) if is_starting else "",
        **speed,
        **{name: summary.get(name) for name in kept},
        "estimate": summary.get("estimate"),
    }


def _read_last_line(run: RunFolder, since: float) -> str:
    """What the last line of run.log since a time says, in seconds since 1970; empty if there is none."""
    for line in reversed(read_text_end(run.logs / "run.log", LINE_BYTES).splitlines()):
        if found := LOG_LINE.fullmatch(line):
            is_new = datetime.fromisoformat(found["time"]).timestamp() >= int(since)
            return found["text"] if is_new else ""
    return ""


def _read_process_time(run: RunFolder) -> float:
    """When the process that trains the run took it, in seconds since 1970; 0 where that was not recorded."""
    try:
        return (run.metadata / PROCESS).stat().st_mtime
    except OSError:
        return 0.0


def arrange_samples(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fixed prompts, each with the answers of base and adapter in the order of steps."""
    prompts: dict[str, dict[str, Any]] = {}
    for line in lines:
        for sample in filter(_is_mapping, line.get("samples", ())):
            about = {key: sample.get(key) for key in ("id", "prompt", "expected")}
            prompt = prompts.setdefault(str(sample.get("id")), {**about, "answers": []})
            kept = {key: sample.get(key) for key in ("generated", "ended", "loops")}
            prompt["answers"].append({"step": line["step"], "base": line.get("base", False), **kept})
    return list(prompts.values())


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def describe_evaluation(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The measures of base and adapter over all rows, by length and by domain, with intervals of the difference."""
    if not report:
        return None
    lengths = [
        {"name": f"{group.get('tokens')} tokens", **_describe_group(group)} for group in report.get("by_length") or ()
    ]
    domains = [{"name": name, **_describe_group(group)} for name, group in (report.get("by_domain") or {}).items()]
    controls = [
        {"name": name.replace("_", " "), **_describe_group({**group, "base": group.get("scores")})}
        for name, group in (report.get("controls") or {}).items()
    ]
    return {
        **_describe_group(report),
        "confidence": report.get("confidence"),
        "by_length": lengths,
        "by_domain": domains,
        "controls": controls,
        "leaks": report.get("leaks"),
        "endings": report.get("endings"),
    }


def _describe_group(group: Mapping[str, Any]) -> dict[str, Any]:
    base, adapter = group.get("base") or {}, group.get("adapter") or {}
    intervals = group.get("intervals") or {}
    measures = [
        {
            "measure": measure,
            "is_share": measure in PERCENT_MEASURES,
            "base": base.get(measure),
            "adapter": adapter.get(measure),
            "interval": intervals.get(measure),
        }
        for measure in SHOWN_MEASURES
        if is_finite_number(adapter.get(measure))
    ]
    return {"rows": group.get("rows"), "leaked": group.get("leaked"), "measures": measures}


def describe_settings(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every setting, with whether it differs from the default."""
    changed = find_differences([_default_settings(), dict(config)])
    return [{"key": key, "value": value, "is_changed": key in changed} for key, value in config.items()]


@cache
def _default_settings() -> dict[str, Any]:
    return flatten_sections(TrainingConfig().model_dump(mode="json"))


def describe_data(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The statistics of each split."""
    counts = ("rows", "examples", "tokens", "supervised_tokens", "truncated", "longest")
    return [
        {
            "split": split,
            "used": data.get(f"{split}_examples"),
            **{name: data[split].get(name) for name in counts},
            "domains": data[split].get("domains") or {},
            "files": [
                {"name": name, "rows": rows, "read_as": (data[split].get("mappings") or {}).get(name)}
                for name, rows in (data[split].get("examples_by_file") or {}).items()
            ],
        }
        for split in ("train", "validation")
        if isinstance(data.get(split), dict)
    ]


def list_events(run: RunFolder, feed: RunFeed) -> dict[str, Any]:
    """The steps at which something happened: epochs end, checkpoints are written, findings arise and clear."""
    steps, epochs = feed.read_columns("step", "epoch")
    epochs = np.floor(np.nan_to_num(epochs) + 1e-9)
    ends = steps[1:][np.diff(epochs) > 0].astype(int).tolist()
    findings = [
        {key: line.get(key) for key in ("step", "event", "code", "title", "severity")} for line in feed.findings
    ]
    return {"epochs": ends, "checkpoints": list_checkpoint_steps(run.checkpoints), "findings": findings}


def list_run_files(run: RunFolder) -> Iterator[dict[str, Any]]:
    """The files that can be downloaded, with their sizes."""
    shown = _resolve_shown_folders(run)
    for name in SHOWN_FOLDERS:
        for path in sorted(list_files(run.root / name)) if (run.root / name).is_dir() else ():
            if _is_within(path, shown):
                yield {"name": path.relative_to(run.root).as_posix(), "bytes": path.stat().st_size}


def is_shown_file(run: RunFolder, path: Path) -> bool:
    """Whether a file may be downloaded: it lies in one of the shown folders, and no link leads out of the run."""
    return _is_within(path, _resolve_shown_folders(run))


def _resolve_shown_folders(run: RunFolder) -> list[Path]:
    root = run.root.resolve()
    return [(root / name).resolve() for name in SHOWN_FOLDERS]


def _is_within(path: Path, folders: Iterable[Path]) -> bool:
    if path.is_symlink() or not path.is_file() or path.name.startswith("."):
        return False
    resolved = path.resolve()
    return any(resolved.is_relative_to(folder) for folder in folders)


def read_log_end(run: RunFolder) -> str:
    """The end of run.log."""
    return read_text_end(run.logs / "run.log", LOG_BYTES)
