"""The KV cache of continuous batching: memory allocated once, in which every row has a slot of its own.

A row's tokens stand in its slot from the first column on, so the column of a token is its position. Rows are of any
lengths; a step adds some tokens to each, and those that are not kept afterwards, refused draft tokens, are overwritten
by the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

GRAIN = 32  # columns: the slice that is read grows in such steps, so that kernels meet few shapes
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of the kinds of layers


class Columns:
    """The columns in use and the tokens of the current step, shared by all layers.

    `lengths` are the tokens that each slot holds, 0 for a free one. The tokens of a step lie one behind the other, slot
    by slot: `bounds` (slots + 1,) are the first ones of each, `ends` (slots,) the columns behind the last ones.
    """

    def __init__(self, rows: int, count: int, window: int | None, device: torch.device) -> None:
        self.count, self.window, self._device = count, window, device
        self.lengths = [0] * rows
        self.end = 0  # behind the last column in use
        self.read = {False: slice(0, 0), True: slice(0, 0)}
        self.open_tokens([0] * rows)

    def open_tokens(self, counts: Sequence[int]) -> None:
        """Begin a step with so many new tokens for each slot.

        `read` is then the slice that a layer reads, by whether it has a window: all columns in use, or from where the
        first window begins. `places` are of each token, on the device: its slot, its column, which is its position, and
        its place where all slots have as many tokens as the one that has `most`.
        """
        slots, most = range(len(counts)), max(counts, default=0)
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.most, self.end = most, max(ends, default=0)
        self.bounds, self.ends = torch.tensor(list(accumulate(counts, initial=0))), torch.tensor(ends)
        places = [(slot, self.lengths[slot] + i, slot * most + i) for slot in slots for i in range(counts[slot])]
        self.places = torch.tensor(places, dtype=torch.int64, device=self._device).view(-1, 3).T  # (3, tokens)
        used = [length for length in self.lengths if length]
        last = min(-(-self.end // GRAIN) * GRAIN, self.count)
        first = max(0, min(used, default=0) + 1 - self.window) if self.window else 0
        self.read = {False: slice(0, last), True: slice(first, last)}


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, each (slots, heads, columns, size)."""

    def __init__(self, columns: Columns, windowed: bool) -> None:
        super().__init__()
        self.columns, self.windowed = columns, windowed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: masked columns are read, too."""
        rows = (len(self.columns.lengths), key_states.shape[1], self.columns.count)
        self.keys = key_states.new_zeros(*rows, key_states.shape[-1])
        self.values = value_states.new_zeros(*rows, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the step's tokens, (tokens, heads, 1, size); give what is read, (slots, heads, columns, size)."""
        slots, columns, _ = self.columns.places
        self.keys[slots, :, columns] = key_states[:, :, 0]
        self.values[slots, :, columns] = value_states[:, :, 0]
        read = self.columns.read[self.windowed]
        return self.keys[:, :, read], self.values[:, :, read]

    def allocate(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, (slots, heads, columns, size), for a caller that writes the step's tokens itself."""
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
        """The column of the newest token of the longest row."""
        return self.columns.end - 1

    def get_max_length(self) -> int:
        """All columns."""
        return self.columns.count


class SlotCache(Cache):
    """A transformers cache of `rows` slots with `columns` tokens each.

    Args:
        windows: of each layer, None for one that sees all; at most one size besides None.
        dtype, device: of the masks, which are added to attention's scores.
    """

    def __init__(
        self, rows: int, columns: int, windows: Sequence[int | None], dtype: torch.dtype, device: torch.device
    ) -> None:
        count = -(-columns // GRAIN) * GRAIN
        self.columns = Columns(rows, count, next((w for w in windows if w), None), device)
        self._dtype, self._device = dtype, device
        self._masks: dict[bool, Tensor] = {}  # of the step, by whether a layer has a window
        super().__init__(layers=[SlotLayer(self.columns, w is not None) for w in windows])

    def write_prompt(self, row: int, prompt: Cache, place: int, prefix: int, length: int) -> None:
        """Take over a prompt of `length` tokens that was just read, from the row `place` of a cache.

        There `prefix` tokens at the left are those that all its rows share; the others are at the right. Columns are
        added where they are too few.
        """
        if length > self.columns.count:
            self.resize_columns(length)
        rest = length - prefix
        for layer, read in zip(self.layers, prompt.layers, strict=True):
            keys, values = read.keys[place], read.values[place]
            if prefix:
                layer.write_tokens(row, keys[:, :prefix], values[:, :prefix], 0)
            layer.write_tokens(row, keys[:, -rest:], values[:, -rest:], prefix)
        self.columns.lengths[row] = length

    def release_row(self, row: int) -> None:
        """Free the slot of a finished row: nothing reads its columns any more."""
        self.columns.lengths[row] = 0

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and drop the others."""
        index = torch.tensor(rows, device=self._device)
        for layer in self._allocated_layers():
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.columns.lengths = [self.columns.lengths[row] for row in rows]

    def add_rows(self, count: int) -> None:
        """Add free slots. Cost: a copy of the cache."""
        for layer in self._allocated_layers():
            layer.keys, layer.values = (pad(held, (0, 0, 0, 0, 0, 0, 0, count)) for held in (layer.keys, layer.values))
        self.columns.lengths += [0] * count

    def resize_columns(self, count: int) -> None:
        """Have `count` columns, or as many as the longest row needs. Cost: a copy of the cache."""
        count = -(-max([count, *self.columns.lengths]) // GRAIN) * GRAIN
        more = count - self.columns.count  # negative padding cuts
        for layer in self._allocated_layers():
            layer.keys, layer.values = (pad(held, (0, 0, 0, more)).contiguous() for held in (layer.keys, layer.values))
        self.columns.count = count

    def open_tokens(self, counts: Sequence[int]) -> Tensor:
        """Begin a step with so many new tokens, at least one, for each slot; gives their positions, (tokens,) int64.

        Columns are added where they are too few.
        """
        needed = max(length + count for length, count in zip(self.columns.lengths, counts, strict=True))
        if needed > self.columns.count:
            self.resize_columns(needed)
        self.columns.open_tokens(counts)
        self._masks.clear()
        return self.columns.places[1]

    def keep_tokens(self, row: int, count: int) -> None:
        """Count the first `count` tokens of the step as those of a row; its others are forgotten."""
        self.columns.lengths[row] += count

    def pad_tokens(self, x: Tensor) -> Tensor:
        """The step's tokens, (tokens, heads, size), by slot: (slots, most tokens of a slot, heads, size)."""
        slots, most = len(self.columns.lengths), self.columns.most
        if most == 1:
            return x[:, None]
        padded = x.new_zeros(slots * most, *x.shape[1:]).index_copy_(0, self.columns.places[2], x)
        return padded.view(slots, most, *x.shape[1:])

    def unpad_tokens(self, x: Tensor) -> Tensor:
        """The reverse of `pad_tokens`."""
        return x[:, 0] if self.columns.most == 1 else x.flatten(0, 1).index_select(0, self.columns.places[2])

    def attention_masks(self) -> dict[str, Tensor]:
        """The additive mask of each kind of layer, (slots, 1, most tokens of a slot, columns read)."""
        return {SLIDING if layer.windowed else FULL: self.attention_mask(layer) for layer in self.layers}

    def attention_mask(self, layer: Any) -> Tensor:
        """That of one layer; made once in a step."""
        if layer.windowed not in self._masks:
            self._masks[layer.windowed] = self._make_mask(layer.windowed)
        return self._masks[layer.windowed]

    def _make_mask(self, windowed: bool) -> Tensor:
        read = self.columns.read[windowed]
        columns = torch.arange(read.start, read.stop, device=self._device)
        lengths = torch.tensor(self.columns.lengths, device=self._device)
        positions = (lengths[:, None] + torch.arange(self.columns.most, device=self._device))[..., None]
        seen = columns <= positions  # (slots, tokens, columns)
        if windowed and self.columns.window is not None:
            seen &= columns > positions - self.columns.window
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~seen, torch.finfo(self._dtype).min)[:, None]

    def _allocated_layers(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if layer.is_initialized]
