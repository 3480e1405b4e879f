"""The base of trackers: delivers the lines of a run's journals as records, in order, each once.

Your own tracker is one subclass.

Example:
    class Pager(Tracker):
        name = "pager"

        def require(self): ...                       # raise IntegrationError if it cannot work
        def open(self): self.line = connect(self.options["number"])
        def log(self, records):
            for record in records:
                if record.kind == "validation":
                    self.line.say(record.scalars["validation/loss"])
        def end(self): self.line.say(self.run.status)

    training-lens train tracking.custom='{my_module.Pager: {number: 42}}'
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from training_lens.errors import IntegrationError
from training_lens.integrations.delivery import Cursor, Integration
from training_lens.integrations.record import RunRecord, hash_values
from training_lens.runs.journal import JournalEntry, JournalPosition, JournalReader

BATCH = {
    "metrics": 512,
    "samples": 64,
    "histograms": 8,
    "evaluations": 64,
    "findings": 64,
}  # most lines of a journal per `log`
ANSWER_COLUMNS = ("step", "base", "id", "prompt", "expected", "generated")  # `base`: whether the base answered
RecordKind = Literal[
    "step", "base", "validation", "validation_sample", "samples", "histograms", "evaluation", "findings"
]


@dataclass(frozen=True)
class Record:
    """An event of the run after `step` steps; `values` is the line of the journal.

    `step`, `base` (the base model's validation, at step 0), `validation` and `validation_sample` (of a fixed sample of
    the rows, in between) are lines of logs/metrics.jsonl;
    `samples` of logs/samples.jsonl; `histograms` of logs/histograms.jsonl; `evaluation` of logs/evaluations.jsonl,
    which evaluate, compare and benchmark write after the training; `findings` of logs/findings.jsonl, of live findings:
    1 when one arises and 0 when it clears.
    """

    kind: RecordKind
    step: int
    values: Mapping[str, Any]

    @property
    def time(self) -> float | None:
        """The time of the event in seconds since the epoch; None if the journal lacks it."""
        time: float | None = self.values.get("time")
        return time

    @property
    def scalars(self) -> dict[str, float]:
        """The numbers by the names that all trackers use; losses in nats per supervised token.

        Empty for samples and histograms.
        """
        values = self.values
        if self.kind == "step":
            names = ("loss", "grad_norm", "lr", "epoch")  # the norm of a skipped step is not finite, and null
            found = {f"train/{name}": float(values[name]) for name in names if values[name] is not None}
            return found | {"train/tokens_per_second": values["tokens"] / values["seconds"]}
        if self.kind in ("base", "validation"):
            found = {"validation/loss": float(values["loss"])}
            if values.get("sample_loss") is not None:
                found["validation/sample_loss"] = float(values["sample_loss"])
            found |= {f"validation/loss_{domain}": loss for domain, loss in values["by_domain"].items()}
            return found | {
                f"validation_files/loss_{Path(file).name}": loss for file, loss in values["by_file"].items()
            }
        if self.kind == "validation_sample":
            return {"validation/sample_loss": float(values["loss"])}
        if self.kind == "findings":
            return {f"findings/{values['code']}": float(values["event"] == "raised")}
        if self.kind == "evaluation":
            return {f"{values['name']}/{name}": value for name, value in values["scalars"].items()}
        return {}

    @property
    def verdict(self) -> str:
        """The verdict of a comparison; else empty."""
        return str((self.values.get("verdict") or {}).get("sentence", ""))


class Tracker(Integration):
    """A service that shows runs. Override `require`, `open`, `log`, `end`, and `close` if there is something to close.

    Args:
        run: the run to show.
        options: of a custom tracker, from the config under tracking.custom.
    """

    def __init__(self, run: RunRecord, **options: Any) -> None:
        self.run, self.options = run, options
        known = f"cursor-{hashlib.sha256(self.destination.encode()).hexdigest()[:8]}" if self.destination else "cursor"
        self.cursor = Cursor(run.tracking_folder(self.name) / f"{known}.json")
        self._readers: dict[str, JournalReader] = {}
        self._opened = False

    @property
    def destination(self) -> str:
        """The server or project of this run, if it can change: each one has a cursor of its own."""
        return ""

    @abstractmethod
    def open(self) -> None:
        """Connect and register the run with its config, before the first records of this process.

        A run that is resumed or sent later is opened again, under the same id.
        """

    @abstractmethod
    def log(self, records: Sequence[Record]) -> None:
        """Send records, those of each journal in order. After an error they come again with the next try."""

    @abstractmethod
    def end(self) -> None:
        """The run has ended with `self.run.status`: send its summary, adapter and report."""

    def forget(self) -> None:
        self.cursor.path.unlink(missing_ok=True)

    def deliver(self, ended: bool) -> None:
        try:
            if not self._readers:
                self._readers = self._open_readers(self.cursor.load())
            while entries := self._next_entries():
                records = [record for named in entries if (record := self._build_record(*named)) is not None]
                if records:
                    self._open_once()
                    self.log(records)
                self._save_positions()
            if ended and self.cursor.load().get("end") != (end := self._end_key()):
                self._open_once()
                self.end()
                self._save_positions(end=end)
        except BaseException:
            self._readers, self._opened = {}, False  # the next try opens it again, and reads on from the cursor
            self.close()
            raise

    def _open_once(self) -> None:
        """Connect, but not before there is something to send."""
        if not self._opened:
            self.open()
            self._opened = True

    def outstanding(self) -> str:
        kept = self.cursor.load()
        readers, lines = self._open_readers(kept), 0
        for name, reader in readers.items():
            while entries := reader.read(BATCH[name]):
                lines += len(entries)
        parts = [f"{lines} lines of its journals"] if lines else []
        parts += ["its end"] if kept.get("end") != self._end_key() else []
        return ", ".join(parts)

    def _next_entries(self) -> list[tuple[str, JournalEntry]]:
        """The next entries of all journals, in the order of steps."""
        entries = [(name, entry) for name, reader in self._readers.items() for entry in reader.read(BATCH[name])]
        return sorted(entries, key=lambda named: named[1].step)

    def _build_record(self, journal: str, entry: JournalEntry) -> Record | None:
        """The record of a line; None for steps between two logging steps."""
        every = self.run.config.training.logging_steps
        kind: RecordKind = entry.values.get("kind", journal)
        if kind == "step" and entry.step % every and entry.step != 1:
            return None
        return Record(kind, entry.step, entry.values)

    def _open_readers(self, kept: Mapping[str, Any]) -> dict[str, JournalReader]:
        """Readers of the journals, from the positions of the cursor."""
        logs, positions = self.run.folder.logs, kept.get("positions", {})
        return {
            name: JournalReader(logs / f"{name}.jsonl", JournalPosition(*positions.get(name, ()))) for name in BATCH
        }

    def _save_positions(self, **more: str) -> None:
        positions = {name: list(reader.position) for name, reader in self._readers.items()}
        self.cursor.save({**self.cursor.load(), "positions": positions, **more})

    def _end_key(self) -> str:
        """Identifies the end of this run; it is another one after a resume."""
        return hash_values([self.run.status, self.run.summary])


def list_answers(samples: Mapping[str, Any]) -> list[list[Any]]:
    """The answers of a line of logs/samples.jsonl, a row each with the columns of `ANSWER_COLUMNS`."""
    about = [samples["step"], samples["base"]]
    return [[*about, *(answer.get(name) for name in ANSWER_COLUMNS[2:])] for answer in samples["samples"]]


def iterate_histograms(record: Record) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """The histograms of a record: what of (weights or gradients), the module, and `low`, `high` and `counts`."""
    for kind, modules in record.values["histograms"].items():
        yield from ((kind, module, histogram) for module, histogram in modules.items())


def iterate_losses(validation: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """The losses of a validation: ("all", "", loss), then ("domain", name, loss) and ("file", name, loss) of each."""
    yield "all", "", validation["loss"]
    yield from (("domain", name, loss) for name, loss in validation["by_domain"].items())
    yield from (("file", Path(path).name, loss) for path, loss in validation["by_file"].items())


def bin_edges(histogram: Mapping[str, Any]) -> Any:
    """The edges of a record's histogram, an array one longer than its `counts`."""
    import numpy as np

    return np.linspace(histogram["low"], histogram["high"], len(histogram["counts"]) + 1)


def require_packages(extra: str, *packages: str) -> None:
    """Require packages, by their import names, which an extra of Training Lens installs; imports none."""
    if missing := [package for package in packages if find_spec(package) is None]:
        plural = "s" if len(missing) > 1 else ""
        raise IntegrationError(
            f"needs the package{plural} {' and '.join(missing)}. Install: pip install 'training-lens[{extra}]'."
        )
