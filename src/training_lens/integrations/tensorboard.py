"""TensorBoard: events in the run's logs folder, written without torch."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training_lens.config.schema import TrainingConfig
from training_lens.display.markdown import escape_markdown, markdown_table
from training_lens.integrations.record import RunRecord, flatten_settings
from training_lens.integrations.tracker import Record, Tracker, bin_edges, iterate_histograms
from training_lens.utils.nested import flatten_sections

OURS = ".training-lens"  # suffix of our events files: only these are ever replaced
SHOWN = """
    model.id model.quantization model.seq_len peft.variant peft.use_dora peft.init peft.r peft.lora_alpha
    peft.lora_dropout peft.target_modules training.lr training.epochs training.max_steps training.batch_size
    training.gradient_accumulation_steps training.optimizer training.scheduler training.warmup_ratio
    training.weight_decay training.max_grad_norm training.seed
""".split()  # settings that are always shown as hyperparameters
TRIED = ("model.", "data.", "peft.", "training.")  # sections whose settings are shown if they are not at their default
GROUPS = {"weights": "weights", "gradients": "weight_gradients"}  # sorted after train and validation
FINAL = ("train_loss", "validation_loss", "base_validation_loss")  # losses of the summary


class TensorBoardIntegration(Tracker):
    """Writes events beside metrics.jsonl; `tensorboard --logdir outputs` shows them.

    Scalars, histograms of the adapter's weights and gradients, sample answers, and hyperparameters with the final
    losses. A process that resumes a run, sends it later, or tries again, replaces the old file by a new one from the
    beginning of the journals: so each step is there once, after any kill.
    """

    name = "tensorboard"
    in_process = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._events: _EventsFile | None = None
        self._base: dict[str, str] = {}
        self._now = time.time()

    def require(self) -> None:
        """TensorBoard is installed with Training Lens."""

    def deliver(self, ended: bool) -> None:
        if not self._opened and self.outstanding():
            self._readers = {}
            self.cursor.save({})
        super().deliver(ended)

    def outstanding(self) -> str:
        return super().outstanding() if self._event_files() else "its events"

    def open(self) -> None:
        for old in self._event_files():
            old.unlink()
        self._events, self._base = _EventsFile(self.run.folder.logs), {}
        started = (self.run.folder.metadata / "config.json").stat().st_mtime
        self._events.write_event(started, summary=_hyperparameter_summary(self.run, started))

    def log(self, records: Sequence[Record]) -> None:
        assert self._events is not None
        for record in records:
            self._now = record.time or time.time()
            if values := self._summary_values(record):
                self._events.write_values(self._now, record.step, values)
        self._events.flush()

    def end(self) -> None:
        assert self._events is not None
        summary = self.run.summary
        values = [_scalar_value(f"whole_run/{name}", summary[name]) for name in FINAL if summary.get(name) is not None]
        self._events.write_values(self._now, int(summary["steps"]), values)
        self._events.write_values(self._now, 0, [_session_end(self.run.status, self._now)])
        self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _event_files(self) -> list[Path]:
        return list(self.run.folder.logs.glob(f"events.out.tfevents.*{OURS}"))

    def _summary_values(self, record: Record) -> list[Any]:
        """The TensorBoard values of a record, one per tag."""
        if record.kind == "histograms":
            return [_histogram_value(f"{GROUPS[kind]}/{name}", bins) for kind, name, bins in iterate_histograms(record)]
        if record.kind == "samples":
            return self._sample_table(record.values)
        verdict = (
            [_text_value(f"{record.values['name']}/verdict", escape_markdown(record.verdict))] if record.verdict else []
        )
        return [*verdict, *(_scalar_value(tag, value) for tag, value in record.scalars.items())]

    def _sample_table(self, values: Mapping[str, Any]) -> list[Any]:
        """A table with the base's answers beside the adapter's."""
        samples = values["samples"]
        if values["base"]:
            self._base = {sample["id"]: sample["generated"] for sample in samples}
        columns = {name: [sample[name] for sample in samples] for name in ("prompt", "expected")}
        if self._base:
            columns["base"] = [self._base.get(sample["id"], "") for sample in samples]
        if not values["base"]:
            columns["adapter"] = [sample["generated"] for sample in samples]
        rows = [[escape_markdown(text) for text in row] for row in zip(*columns.values(), strict=True)]
        return [_text_value("samples", markdown_table(list(columns), rows))]


class _EventsFile:
    """A TensorBoard events file, written in the calling thread, so that errors are raised to the caller."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        path = folder / f"events.out.tfevents.{now:.6f}.{platform.node()}.{os.getpid()}{OURS}"
        self._records = RecordWriter(path.open("wb"))
        self.write_event(now, file_version="brain.Event:2")
        # A TensorBoard that is open drops what it read from an earlier file.
        self.write_event(now, session_log=SessionLog(status=SessionLog.START))

    def write_event(self, when: float, step: int = 0, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=when, step=step, **what).SerializeToString())

    def write_values(self, when: float, step: int, values: Sequence[Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.write_event(when, step, summary=Summary(value=values))

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def _scalar_value(tag: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, simple_value=value)


def _histogram_value(tag: str, values: Mapping[str, Any]) -> Any:
    """Rows of (left edge, right edge, count), as in TensorBoard's own summaries."""
    import numpy as np
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.histogram.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    edges = bin_edges(values)
    rows = np.stack([edges[:-1], edges[1:], np.array(values["counts"], np.float64)], 1)  # (bins, 3)
    about = create_summary_metadata(display_name=tag.split("/", 1)[1], description="")  # the heading, which is narrow
    return Summary.Value(tag=tag, metadata=about, tensor=make_tensor_proto(rows))


def _text_value(tag: str, markdown: str) -> Any:
    from tensorboard.plugins.text.summary_v2 import text_pb

    return text_pb(tag, markdown).value[0]


def _hyperparameter_summary(run: RunRecord, started: float) -> Any:
    """The usual settings, and those that are not at their default."""
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    defaults = flatten_sections(TrainingConfig().model_dump(mode="json"))
    values = flatten_sections(run.settings).items()
    changed = {name for name, value in values if name.startswith(TRIED) and value != defaults.get(name)}
    settings = {name: value for name, value in flatten_settings(run).items() if name in {*SHOWN, *changed}}
    return hparams_pb(settings, trial_id=run.run_id, start_time_secs=started)


def _session_end(status: str, when: float) -> Any:
    """The value of hparams.summary.session_end_pb, which needs TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    known = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
    info = plugin_data_pb2.SessionEndInfo(status=known.get(status, api_pb2.STATUS_UNKNOWN), end_time_secs=when)
    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info))
    return Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
