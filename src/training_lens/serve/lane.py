"""The rows that one decoder decodes, in a KV cache that grows and shrinks with them."""

from __future__ import annotations

from collections.abc import Sequence

from training_lens.inference.decode_loop import DecodeBatch, Decoder
from training_lens.inference.row_sampler import RowSampler
from training_lens.inference.sampler import Completion

LARGEST_WASTE = 2  # times the columns that are needed: wider slots are cut


class Lane:
    """Rows of one decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._batch: DecodeBatch | None = None  # None without rows, so that their memory is free

    @property
    def rows(self) -> Sequence[Completion]:
        return self._batch.completions if self._batch else ()

    @property
    def cache_tokens(self) -> int:
        """The size of the KV cache."""
        return len(self._batch.rows) * self._batch.columns if self._batch else 0

    def count_cache_tokens(self, more: Sequence[Completion]) -> int:
        """The size of the KV cache with these rows besides."""
        return (len(self.rows) + len(more)) * count_columns([*self.rows, *more])

    def prefill_rows(self, rows: Sequence[Completion]) -> None:
        """Read the prompts of rows together, and give each its first token."""
        columns = count_columns([*self.rows, *rows])
        if self._batch is None:
            self._batch = DecodeBatch(self.decoder, RowSampler(), len(rows), columns)
        elif self._batch.columns < columns:
            self._batch.resize_columns(columns)
        self._batch.prefill_rows(rows)

    def step(self) -> None:
        """A token for every row, and those that its draft has right."""
        if self._batch:
            self._batch.step()

    def remove_row(self, row: Completion) -> None:
        if self._batch and row in self._batch.rows:
            self._batch.remove_row(row)

    def clear(self) -> None:
        """Drop all rows."""
        self._batch = None

    def shrink(self) -> None:
        """Free slots and columns of which more than half are not needed."""
        batch = self._batch
        if batch is None or not batch.completions:
            self._batch = None
            return
        if 2 * len(batch.completions) <= len(batch.rows):
            batch.drop_free_slots()
        columns = count_columns(batch.completions)
        if batch.columns > LARGEST_WASTE * columns:
            batch.resize_columns(columns)


def count_columns(rows: Sequence[Completion]) -> int:
    """The columns that the longest row may come to need."""
    return max(row.max_length for row in rows)
