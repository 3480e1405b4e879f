"""TensorBoard: events in the run's logs folder, written without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training_lens.integrations.tracker import Record, Tracker


class TensorBoardIntegration(Tracker):
    """Writes events beside metrics.jsonl; `tensorboard --logdir outputs` shows them.

    A process that goes on with a run writes a further events file, from where the last one was remembered.
    """

    name = "tensorboard"
    in_process = True

    def require(self) -> None:
        """TensorBoard is installed with Training Lens."""

    def open(self) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer: Any = EventFileWriter(str(self.run.folder.logs))

    def log(self, records: Sequence[Record]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for record in records:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in record.scalars.items()]
            if values:
                self._writer.add_event(Event(step=record.step, summary=Summary(value=values)))
        self._writer.flush()

    def end(self) -> None:
        pass

    def close(self) -> None:
        if writer := getattr(self, "_writer", None):
            writer.close()
