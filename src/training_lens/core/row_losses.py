"""The losses of training rows at each visit: which rows are recorded, and what one step adds to the table.

The losses are those that the step computes anyway, so recording them takes no forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch

from training_lens.core.types import Captured

BYTES_PER_VISIT = 14  # on disk, as benchmarks/explain/row_losses.py measures it in a short run
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class RowLosses:
    """The rows of one optimizer step: their ids, their losses in nats per supervised token, and these tokens' number.

    A row that the step visits twice stands here twice.
    """

    ids: Sequence[str]
    losses: Sequence[float] | np.ndarray
    tokens: Sequence[int] | np.ndarray


def choose_interval(visits: int, megabytes: int) -> int:
    """One row in how many is recorded, so that `visits` of rows in a whole run stay within `megabytes`; 0: none.

    Example:
        >>> choose_interval(visits=200_000, megabytes=64), choose_interval(visits=20_000_000, megabytes=64)
        (1, 5)
    """
    return max(1, math.ceil(visits * BYTES_PER_VISIT / (megabytes * MEGABYTE))) if megabytes else 0


def is_recorded(row_id: str, every: int) -> bool:
    """Whether a row is among those recorded: a fixed choice by its id, so that each has all of its visits or none."""
    return every == 1 or crc32(row_id.encode("utf-8", "surrogatepass")) % every == 0


def select_rows(rows: RowLosses, every: int) -> Captured:
    """The rows of one step that are recorded, each once: what visits of one row in the same step say is the same."""
    chosen = {row_id: i for i, row_id in enumerate(rows.ids) if is_recorded(row_id, every)}
    places = np.fromiter(chosen.values(), np.int64, len(chosen))
    values = np.array([rows.losses, rows.tokens], dtype=np.float32)[:, places]
    losses, tokens = torch.from_numpy(values)
    return Captured({"loss": losses, "tokens": tokens}, rows=tuple(chosen))
