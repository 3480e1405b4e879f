"""Reads the layers of a run that trains, in a thread: it takes torch, and seconds the first time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from threading import Thread

import numpy as np

from training_lens.analysis.page.recording_cache import RecordingCache
from training_lens.errors import TrainingLensError
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
SECONDS = 10.0  # at least, between two readings
REST = 20  # times as long as a reading took: at least, until the next one
EXIT_SECONDS = 20.0  # a thread that imports torch must end before the interpreter does


@dataclass(frozen=True)
class LayerMap:
    """Update strength, |dW| / |W|, of each layer at the steps where it was measured; `values` is (layers, steps)."""

    names: tuple[str, ...]
    steps: tuple[int, ...]
    values: np.ndarray


class LayerReader:
    """The newest layer map of a run, which a thread of its own reads now and then; none where it is not on."""

    def __init__(self, run: RunFolder, *, is_on: bool = True) -> None:
        self._run, self._recordings, self._is_on = run, RecordingCache(), is_on
        self._thread: Thread | None = None
        self._due = 0.0
        self._newest: LayerMap | None = None

    def refresh_map(self) -> LayerMap | None:
        """The newest map; starts to read another where it is time. None before the first."""
        if time.monotonic() >= self._due:
            self._start_thread()
        return self._newest

    def read_last_map(self) -> LayerMap | None:
        """The map of all that was captured, which is waited for."""
        self.wait_for_thread()
        self._start_thread()
        self.wait_for_thread()
        return self._newest

    def wait_for_thread(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None:
            self._thread.join(EXIT_SECONDS)

    def _start_thread(self) -> None:
        is_reading = self._thread is not None and self._thread.is_alive()
        if self._is_on and not is_reading and (self._run.lens / "lens.json").is_file():
            self._thread = Thread(target=self._read_layers, daemon=True)
            self._thread.start()

    def _read_layers(self) -> None:
        import training_lens.analysis.open_recording  # noqa: F401  # with torch, whose seconds are no reading

        started = time.monotonic()
        try:
            self._newest = read_layer_map(self._run, self._recordings) or self._newest
        except (TrainingLensError, OSError, ValueError, KeyError) as error:
            logger.debug("the layers of %s cannot be read: %s", self._run.run_id, error)
        finally:
            now = time.monotonic()
            self._due = now + max(SECONDS, REST * (now - started))


def read_layer_map(run: RunFolder, recordings: RecordingCache) -> LayerMap | None:
    """The map as captured so far; None where nothing was.

    Raises:
        LensError: the captures cannot be read.
    """
    from training_lens.analyzers.module_groups import read_evolution  # imports torch

    series = read_evolution(recordings.open(run), "strength", "layer")
    if not len(series.steps) or not np.isfinite(series.values).any():
        return None
    return LayerMap(series.names, tuple(series.steps.tolist()), series.values.T)
