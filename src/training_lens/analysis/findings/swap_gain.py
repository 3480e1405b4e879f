"""How much the right prompts lower the loss of answers, as a run measured it at its end by swapping prompts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from training_lens.analyzers.module_groups import finite_points
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.measures.curves import NORMAL_95


class SwapGain(NamedTuple):
    """By how many nats per token the right prompts lower the loss, and the standard error of that; NaN if unknown."""

    gain: float
    error: float

    @classmethod
    def from_recording(cls, recording: Recording, of: str) -> SwapGain:
        """`of` is `swap` for held-out rows, `base_swap` for these in the base, or `train_swap` for training rows."""
        found = [finite_points(recording, tables.EVALUATION, f"{of}_{name}")[1] for name in ("gain", "error")]
        return cls(*(float(values[-1]) if len(values) else np.nan for values in found))

    @property
    def bounds(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.gain - NORMAL_95 * self.error, self.gain + NORMAL_95 * self.error

    def __str__(self) -> str:
        return "{:+.3g} ({:+.3g} to {:+.3g})".format(self.gain, *self.bounds)
