"""The KV cache of continuous batching: memory allocated once, and one column for the newest token of every row.

All rows end in the same column, wherever they start: a token is written with one copy for all rows, a sliding window
is one slice, and a new prompt takes the slot of a finished row so that it ends in that column, too. Columns before a
row's start are masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

GRAIN = 32  # columns: the slice that is read grows in such steps, so that kernels meet few shapes
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of the kinds of layers


class Columns:
    """The columns in use, shared by all layers; `starts` are the rows' first ones, None for a slot without a row."""

    def __init__(self, rows: int, count: int, window: int | None) -> None:
        self.count, self.window = count, window
        self.starts: list[int | None] = [None] * rows
        self.end = 0
        self.read = {False: slice(0), True: slice(0)}
        self.seen = torch.zeros(rows, dtype=torch.int64)  # each row's first column; the newest one for an empty slot

    @property
    def first_used(self) -> int:
        """The first column that any row uses."""
        return min((s for s in self.starts if s is not None), default=self.end)

    def advance(self) -> None:
        """Add a column. `read` is then the slice that a layer reads, by whether it has a window; `seen` a row's first.

        The slice goes from the first column in use, or from where the window begins, to the newest.
        """
        self.end += 1
        self.seen = torch.tensor([self.end - 1 if start is None else start for start in self.starts])
        first, last = self.first_used, min(-(-self.end // GRAIN) * GRAIN, self.count)
        everything = slice(first // GRAIN * GRAIN, last)
        narrow = self.window is not None and self.end - self.window > first
        self.read = {False: everything, True: slice(self.end - (self.window or 0), last) if narrow else everything}


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, each (rows, heads, columns, size)."""

    def __init__(self, columns: Columns, windowed: bool) -> None:
        super().__init__()
        self.columns, self.windowed = columns, windowed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: masked columns are read, too."""
        rows = (len(self.columns.starts), key_states.shape[1], self.columns.count)
        self.keys = key_states.new_zeros(*rows, key_states.shape[-1])
        self.values = value_states.new_zeros(*rows, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the newest token of every row; give what the layer reads, (rows, heads, columns in use, size)."""
        newest, read = self.columns.end - 1, self.columns.read[self.windowed]
        self.keys[:, :, newest : newest + 1] = key_states
        self.values[:, :, newest : newest + 1] = value_states
        return self.keys[:, :, read], self.values[:, :, read]

    def allocate(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, (rows, heads, columns, size), for a caller that writes the newest tokens itself."""
        if not self.is_initialized:
            self.lazy_initialization(key[:, :, None], value[:, :, None])
        return self.keys, self.values

    def write_tokens(self, row: int, keys: Tensor, values: Tensor, start: int) -> None:
        """Write some of a prompt's tokens, (heads, tokens, size), from column `start` on."""
        if not self.is_initialized:
            self.lazy_initialization(keys[None], values[None])
        self.keys[row, :, start : start + keys.shape[1]] = keys
        self.values[row, :, start : start + keys.shape[1]] = values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what is read."""
        read = self.columns.read[self.windowed]
        return read.stop - read.start, read.start

    def get_seq_length(self) -> int:
        """The column of the newest token."""
        return self.columns.end - 1

    def get_max_length(self) -> int:
        """All columns."""
        return self.columns.count


class SlotCache(Cache):
    """A transformers cache of `rows` slots with `columns` tokens each.

    Args:
        windows: of each layer, None for one that sees all; at most one size besides None.
        dtype, device: of the mask, which is added to attention's scores.
    """

    def __init__(
        self, rows: int, columns: int, windows: Sequence[int | None], dtype: torch.dtype, device: torch.device
    ) -> None:
        count = -(-columns // GRAIN) * GRAIN
        self.columns = Columns(rows, count, next((w for w in windows if w), None))
        self.hidden = torch.finfo(dtype).min
        self.mask = torch.full((rows, 1, 1, count), self.hidden, dtype=dtype, device=device)
        super().__init__(layers=[SlotLayer(self.columns, w is not None) for w in windows])

    def write_prompt(self, row: int, prompt: Cache, place: int, prefix: int, length: int) -> None:
        """Take over a prompt of `length` tokens that was just read, from the row `place` of a cache.

        There `prefix` tokens at the left are those that all its rows share; the others are at the right. Rows that end
        too early for the prompt move to the right, and columns are added where they are too few.
        """
        if length > self.columns.end:
            self._end_rows_at(length)
        start, rest = self.columns.end - length, length - prefix
        for layer, read in zip(self.layers, prompt.layers, strict=True):
            keys, values = read.keys[place], read.values[place]
            if prefix:
                layer.write_tokens(row, keys[:, :prefix], values[:, :prefix], start)
            layer.write_tokens(row, keys[:, -rest:], values[:, -rest:], start + prefix)
        self.columns.starts[row] = start
        self.mask[row] = self.hidden
        self.mask[row, ..., start : self.columns.end] = 0

    def release_row(self, row: int) -> None:
        """Free the slot of a finished row: nothing reads its columns any more."""
        self.columns.starts[row] = None

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and drop the others."""
        index = torch.tensor(rows, device=self.mask.device)
        for layer in self._allocated_layers():
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.mask = self.mask[index]
        self.columns.starts = [self.columns.starts[row] for row in rows]

    def add_rows(self, count: int) -> None:
        """Add free slots. Cost: a copy of the cache."""
        for layer in self._allocated_layers():
            layer.keys, layer.values = (pad(held, (0, 0, 0, 0, 0, 0, 0, count)) for held in (layer.keys, layer.values))
        self.mask = pad(self.mask, (0, 0, 0, 0, 0, 0, 0, count), value=self.hidden)
        self.columns.starts += [None] * count

    def resize_columns(self, count: int) -> None:
        """Have `count` columns, or as many as the longest row needs. Cost: a copy of the cache."""
        longest = self.columns.end - self.columns.first_used
        count = -(-max(count, longest) // GRAIN) * GRAIN
        if count < self.columns.end:
            self._end_rows_at(longest)
        more = count - self.columns.count  # negative padding cuts
        for layer in self._allocated_layers():
            layer.keys, layer.values = (pad(held, (0, 0, 0, more)).contiguous() for held in (layer.keys, layer.values))
        self.mask = pad(self.mask, (0, more), value=self.hidden).contiguous()
        self.columns.count = count

    def open_column(self) -> None:
        """Make room for the next token of every row; where the columns are full, all move to the left first."""
        if self.columns.end == self.columns.count:
            self._end_rows_at(self.columns.end - self.columns.first_used)
        if self.columns.end == self.columns.count:
            self.resize_columns(self.columns.count + GRAIN)
        self.mask[..., self.columns.end] = 0
        self.columns.advance()

    def _end_rows_at(self, end: int) -> None:
        """Move all rows so that they end in the column `end`; those that would begin before the first one, less."""
        first, before = self.columns.first_used, self.columns.end
        end = max(end, before - first)
        if end > self.columns.count:
            self.resize_columns(end)
        by = end - before
        for held in (part for layer in self._allocated_layers() for part in (layer.keys, layer.values)):
            held[:, :, first + by : end] = held[:, :, first:before].clone()
        moved = self.mask[..., first:before].clone()
        self.mask.fill_(self.hidden)
        self.mask[..., first + by : end] = moved
        self.columns.starts = [None if start is None else start + by for start in self.columns.starts]
        self.columns.end = end

    def _allocated_layers(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def attention_masks(self) -> dict[str, Tensor]:
        """The additive attention mask of each kind of layer, (rows, 1, 1, columns read)."""
        kinds = {SLIDING if layer.windowed else FULL: layer.windowed for layer in self.layers}
        return {kind: self.mask[..., self.columns.read[windowed]] for kind, windowed in kinds.items()}
