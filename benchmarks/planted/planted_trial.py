"""One trial: a case is planned, trained and analyzed, and all that was said about it is kept."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from planted_case import Case, Rows, Stage

TEXT = 240  # characters of what was measured that are kept
PREFLIGHT, LIVE = "reports/preflight.json", "logs/findings.jsonl"


@dataclass
class Transcript:
    """What was said about a trial, stage by stage.

    `findings`: plain values of each finding, with its `stage`. `messages`: warnings of the log, refusals and stops, as
    (stage, text). `losses`: the base's and the last validation loss.
    """

    findings: list[dict[str, Any]] = field(default_factory=list)
    messages: list[tuple[Stage, str]] = field(default_factory=list)
    losses: dict[str, float | None] = field(default_factory=dict)
    stopped: Stage | None = None
    seconds: float = 0.0

    def add_findings(self, stage: Stage, findings: Iterable[Any]) -> None:
        """Keep findings of a stage, `Finding`s or their plain values."""
        for finding in findings:
            values = finding if isinstance(finding, dict) else asdict(finding)
            kept = {key: values.get(key, "") for key in ("code", "severity", "confidence", "title", "decide", "action")}
            texts = {key: str(values.get(key, ""))[:TEXT] for key in ("where", "measured")}
            self.findings.append({"stage": stage, **kept, **texts})


class _WarningCollector(logging.Handler):
    """Keeps the log's warnings with the stage in which they came."""

    def __init__(self, transcript: Transcript) -> None:
        super().__init__(logging.WARNING)
        self.transcript = transcript
        self.stage: Stage = "before"

    def emit(self, record: logging.LogRecord) -> None:
        self.transcript.messages.append((self.stage, record.getMessage()[: 2 * TEXT]))


@contextmanager
def _collect_warnings(transcript: Transcript) -> Iterator[_WarningCollector]:
    logger, collector = logging.getLogger("training_lens"), _WarningCollector(transcript)
    logger.addHandler(collector)
    try:
        yield collector
    finally:
        logger.removeHandler(collector)


def write_rows(folder: Path, name: str, rows: Rows) -> str:
    """The path of the rows as JSONL."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def build_config(case: Case) -> Any:
    """The case's config, its rows as files in its scratch folder."""
    from training_lens import TrainingConfig

    values: dict[str, Any] = {name: dict(keys) for name, keys in case.sections.items()}
    values["model"] = {"id": str(case.base), **values.get("model", {})}
    splits = {"train": case.train, "validation": case.validation}
    files = {name: [write_rows(case.scratch, name, rows)] for name, rows in splits.items() if rows}
    values["data"] = {**files, **values.get("data", {})}
    values["output"] = {"base_output_dir": str(case.scratch / "outputs"), "run_id": "trial"}
    return TrainingConfig.model_validate(values)


def run_trial(case: Case, is_enough: Callable[[Transcript], bool] = lambda _: False) -> Transcript:
    """Everything that is said about the case, from its plan to its analysis; not trained if its plan says enough."""
    from training_lens.errors import InterruptedRunError, TrainingLensError

    transcript, began = Transcript(), time.perf_counter()
    folder = case.scratch / ("outputs/experiments/default/runs/trial" if case.loop is None else "lens")
    with _collect_warnings(transcript) as collector:
        try:
            if not _plan_case(case, transcript, is_enough):
                collector.stage = "during"
                _train_case(case, folder)
                collector.stage = "after"
        except InterruptedRunError:
            raise  # of this process, not of the trial
        except TrainingLensError as error:
            transcript.stopped = "before" if "before step 1" in str(error) else collector.stage
            transcript.messages.append((transcript.stopped, f"{type(error).__name__}: {error}"[: 4 * TEXT]))
        _read_run(folder, transcript)
    transcript.seconds = round(time.perf_counter() - began, 2)
    return transcript


def _plan_case(case: Case, transcript: Transcript, is_enough: Callable[[Transcript], bool]) -> bool:
    """Plan the case, and whether what its plan says is enough. In another loop than ours, nobody plans."""
    if case.loop is not None or not case.is_planned:
        return False
    from training_lens import TrainingWrapper

    transcript.add_findings("before", TrainingWrapper(build_config(case)).plan().findings)
    return is_enough(transcript)


def _train_case(case: Case, folder: Path) -> None:
    """Train it, in our loop or in its own, which takes its tokens from our plan."""
    from training_lens import TrainingWrapper

    wrapper = TrainingWrapper(build_config(case))
    if case.loop is None:
        wrapper.train()
    else:
        case.loop(wrapper.plan()).train(folder)


def _read_run(run: Path, transcript: Transcript) -> None:
    """The findings of a run's folder: before the first update, while it trained, of its analysis; and its losses."""
    from training_lens import CheckpointAnalyzer
    from training_lens.errors import LensError

    if not run.is_dir():
        return
    preflight, live = run / PREFLIGHT, run / LIVE
    if preflight.is_file():  # with what the base's own loss shows before the first update
        transcript.add_findings("before", json.loads(preflight.read_text(encoding="utf-8"))["findings"])
    if live.is_file():
        lines = map(json.loads, live.read_text(encoding="utf-8").splitlines())
        transcript.add_findings("during", (line for line in lines if line["event"] == "raised"))
    try:
        analysis = CheckpointAnalyzer(run).analyze()
    except LensError:
        return
    transcript.add_findings("after", analysis.findings)
    for name, measure in (("base", "base_loss"), ("last", "loss")):
        series = analysis.recording.series("evaluation", measure)
        known = series.values[np.isfinite(series.values)]
        transcript.losses[name] = round(float(known[-1]), 4) if known.size else None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder for one trial."""
    folder = Path(tempfile.mkdtemp(prefix="planted-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
