"""Many lines of a journal at once, as columns of numbers: a log of 100,000 steps is read in a fraction of a second."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from training_lens.utils.integrity import has_valid_seal

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_BYTES = 1 << 20  # of a journal that are parsed together
KIND, STEP = "kind", "step"


@dataclass(frozen=True)
class LineTable:
    """Undamaged lines in the order of steps. `columns` are (lines,) float64 each, NaN where a line has no number.

    `steps` is (lines,) int64, `kinds` (lines,) holds the word under `kind` or None, `texts` (lines,) the lines.
    """

    steps: np.ndarray
    kinds: np.ndarray
    columns: Mapping[str, np.ndarray]
    texts: np.ndarray

    def choose_lines(self, chosen: np.ndarray) -> LineTable:
        """The lines where `chosen`, (lines,) bool, is true."""
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return LineTable(self.steps[chosen], self.kinds[chosen], columns, self.texts[chosen])


def parse_table(block: bytes, names: Sequence[str]) -> LineTable | None:
    """Whole lines as a table; None if one is damaged, without a checksum or out of order, or has text for a number."""
    lines = block.removesuffix(b"\n").split(b"\n")
    table = _parse_columns(block, names) if all(map(has_valid_seal, lines)) else None
    if table is None or table.num_rows != len(lines) or table[STEP].null_count:
        return None
    steps = table[STEP].to_numpy()
    if (np.diff(steps) < 0).any():
        return None
    columns = {name: table[name].to_numpy().astype(np.float64, copy=False) for name in names}
    return LineTable(steps, table[KIND].to_numpy(zero_copy_only=False), columns, np.array(lines, object))


def _parse_columns(block: bytes, names: Sequence[str]) -> pa.Table | None:
    """The values under `names`, kind and step; None where a line has another type there."""
    import pyarrow as pa
    from pyarrow import json

    types = {**dict.fromkeys(names, pa.float64()), KIND: pa.string(), STEP: pa.int64()}
    options = json.ParseOptions(explicit_schema=pa.schema(types), unexpected_field_behavior="ignore")
    try:
        read = json.ReadOptions(use_threads=False, block_size=len(block))
        return json.read_json(io.BytesIO(block), read_options=read, parse_options=options)
    except pa.ArrowInvalid:
        return None
