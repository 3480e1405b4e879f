"""The decode loop with continuous batching: each row grows by a token a step, and a finished row frees its slot.

Prompts are prefilled in batches, a prefix that all share only once (prefix caching). From then on a row is one slot of
the KV cache (`SlotCache`), and the next prompt takes a slot that has become free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from training_lens.inference.sampler import Completion, Sampler
from training_lens.models.fast.decoder_stack import DecoderStack
from training_lens.models.fast.kv_cache import FULL, SLIDING, SlotCache

MIN_SHARED_TOKENS = 16  # a shorter prefix is not worth a forward pass of its own
MAX_LENGTH_RATIO = 2  # a prompt that is shorter than the longest by this factor waits for rows of its own size
FEW_ROWS = 8  # that all fit go together: a decoding step of them takes hardly more time than one of a single row
CPU_PREFILL_TOKENS = 512  # prefilled at a time: more would only make tensors that no CPU cache holds
COLUMN_SLACK = 4  # a quarter more cache columns than one row takes, so that they are seldom compacted


@dataclass(frozen=True)
class Decoder:
    """A model as the decode loop calls it."""

    model: Any
    windows: tuple[int | None, ...]  # the attention window of each layer, None for full attention
    keeps_last: bool  # whether the model takes `logits_to_keep`
    dtype: torch.dtype
    device: torch.device
    stack: DecoderStack | None = None  # the forward pass through our own layers, where it gives the same logits
    is_merged: bool = False  # an adapter is merged into its weights
    paths: Mapping[int, str] = field(default_factory=dict)  # of the layers that its fused ones were built of, by id

    def compute_logits(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor] | None, cache: Cache) -> Tensor:
        """Logits after the last token of each row, (rows, vocabulary); the tokens are added to the KV cache.

        `ids` and `positions` are (rows, tokens) int64. The mask of each kind of layer is added to its attention scores;
        None: causal, without padding.
        """
        if self.stack:
            return self.stack.logits(ids, positions, masks, cache)
        mask = masks if masks is None or len(masks) > 1 else next(iter(masks.values()))
        last = {"logits_to_keep": 1} if self.keeps_last else {}
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **last
        )
        logits: Tensor = out.logits[:, -1]
        return logits


@dataclass(frozen=True)
class SharedPrefix:
    """The prefix that all prompts share, prefilled once: `length` tokens, and a KV cache of one row; or empty."""

    length: int = 0
    cache: Cache | None = None

    def expand_cache(self, rows: int) -> DynamicCache:
        """A KV cache in which each of `rows` rows holds the prefix."""
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers if self.cache else ()):
            cache.update(*(x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values)), index)
        return cache


def prefill_shared_prefix(decoder: Decoder, prompts: Sequence[list[int]]) -> SharedPrefix:
    """Prefill what the prompts share, without the last token of each, if it is long enough to pay."""
    first, last = min(prompts), max(prompts)  # in the order of their tokens: what these two share, all do
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = min(same, min(map(len, prompts)) - 1)
    if len(prompts) < 2 or length < MIN_SHARED_TOKENS:
        return SharedPrefix()
    return SharedPrefix(length, prefill(decoder, [first[:length]], SharedPrefix())[1])


def prefill(decoder: Decoder, prompts: Sequence[Sequence[int]], prefix: SharedPrefix) -> tuple[Tensor, Cache]:
    """The logits after each prompt, (rows, vocabulary), and the KV cache, padded between the prefix and the rest."""
    rests = [list(prompt[prefix.length :]) for prompt in prompts]
    width = max(map(len, rests))
    pads = torch.tensor([width - len(rest) for rest in rests], device=decoder.device)
    ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=decoder.device)
    offsets = torch.arange(width, device=decoder.device) - pads[:, None]  # (rows, width)
    cache = prefix.expand_cache(len(prompts))
    is_causal = prefix.length == 0 and not pads.any() and all(w is None or width <= w for w in decoder.windows)
    masks = None if is_causal else _prefill_masks(decoder, pads, offsets, prefix.length)
    return decoder.compute_logits(ids, (offsets + prefix.length).clamp_min(0), masks, cache), cache


def _prefill_masks(decoder: Decoder, pads: Tensor, offsets: Tensor, shared: int) -> dict[str, Tensor]:
    """The masks added to the attention scores in prefill, (rows, 1, width, shared + width), for each kind of layer."""
    width = offsets.shape[1]
    columns = torch.arange(width, device=offsets.device)
    causal = columns <= columns[:, None]
    rest = (columns >= pads[:, None])[:, None] & causal  # (rows, width, width)
    seen = torch.cat([rest.new_ones(len(pads), width, shared), rest], dim=-1)
    before = torch.arange(shared, device=offsets.device).expand(len(pads), -1)
    positions = torch.cat([before, offsets + shared], dim=-1)  # (rows, shared + width)
    distance = positions[:, None, shared:].transpose(1, 2) - positions[:, None]  # (rows, width, shared + width)
    masks = {}
    for window in set(decoder.windows):
        visible = seen if window is None else seen & (distance < window)
        mask = torch.zeros(visible.shape, dtype=decoder.dtype, device=offsets.device)
        masks[FULL if window is None else SLIDING] = mask.masked_fill(~visible, torch.finfo(decoder.dtype).min)[:, None]
    return masks


class DecodeLoop:
    """Decodes completions in `rows` slots by continuous batching.

    Args:
        waiting: the longest first. They are taken as slots become free, up to the first that is so much shorter than
            the longest that it had better wait for more slots.
        stops: tokens that end an answer; they are not part of it.
        on_token: called with each token of an answer.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        waiting: Sequence[Completion],
        rows: int,
        stops: frozenset[int],
        on_token: Callable[[int], None] | None = None,
    ) -> None:
        self._decoder, self._sampler, self._stops, self._on_token = decoder, sampler, stops, on_token
        longest = waiting[0].max_length
        all_fit = len(waiting) <= min(rows, FEW_ROWS)
        self._waiting = deque(c for c in waiting if all_fit or MAX_LENGTH_RATIO * c.max_length > longest)
        self._prefix = prefill_shared_prefix(decoder, [list(c.prompt) for c in self._waiting])
        self._budget = min(rows * longest, CPU_PREFILL_TOKENS) if decoder.device.type == "cpu" else rows * longest
        self._rows: list[Completion | None] = [None] * rows
        columns = longest + (longest // COLUMN_SLACK if len(self._waiting) > rows else 0)
        self._cache = SlotCache(rows, columns, decoder.windows, decoder.dtype, decoder.device)
        self._cache.columns.end = max(len(c.prompt) for c in self._waiting)
        self._last = torch.zeros(rows, dtype=torch.int64, device=decoder.device)
        self._positions, self._live = torch.zeros_like(self._last), torch.zeros_like(self._last)

    def run(self) -> Iterator[list[Completion]]:
        """Yield completions as they finish."""
        while self._waiting or any(self._rows):
            enough = min(len(self._waiting), max(1, len(self._rows) // 8))  # free slots, for a prefill to pay
            if self._waiting and self._rows.count(None) >= enough:
                yield from self._prefill_free_slots()
            elif not self._waiting and 2 * sum(row is not None for row in self._rows) <= len(self._rows):
                self._drop_free_slots()
            if any(self._rows) and (finished := self._decoding_step()):
                yield finished

    def _prefill_free_slots(self) -> Iterator[list[Completion]]:
        """Prefill prompts into the free slots, in batches within the token budget."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        while free and self._waiting:
            width = len(self._waiting[0].prompt)
            count = min(len(free), len(self._waiting), max(1, self._budget // width))
            batch = [self._waiting.popleft() for _ in range(count)]
            logits, cache = prefill(self._decoder, [c.prompt for c in batch], self._prefix)
            tokens = self._sampler.sample_next_token(logits, batch)
            finished = self._append_tokens(batch, tokens.tolist())
            for i, completion in enumerate(batch):
                if completion not in finished:
                    slot, length = free.pop(0), len(completion.prompt)
                    self._cache.write_prompt(slot, cache, i, self._prefix.length, length)
                    self._rows[slot] = completion
                    self._last[slot], self._positions[slot], self._live[slot] = tokens[i], length, 1
            if finished:
                yield finished

    def _decoding_step(self) -> list[Completion]:
        """One more token for every row; returns the rows that it finishes."""
        self._cache.open_column()
        masks = self._cache.attention_masks()
        logits = self._decoder.compute_logits(self._last[:, None], self._positions[:, None], masks, self._cache)
        self._last = self._sampler.sample_next_token(logits, self._rows)
        self._positions += self._live
        finished = self._append_tokens(self._rows, self._last.tolist())  # the one sync point of a step
        for completion in finished:
            slot = self._rows.index(completion)
            self._rows[slot] = None
            self._cache.release_row(slot)
            self._positions[slot] = self._live[slot] = 0  # an empty slot must not run out of positions
        return finished

    def _append_tokens(self, rows: Sequence[Completion | None], tokens: Sequence[int]) -> list[Completion]:
        """Give each completion its token; returns those that are finished with it."""
        finished = []
        for completion, token in zip(rows, tokens, strict=True):
            if completion is None:
                continue
            completion.has_stopped = token in self._stops
            if not completion.has_stopped:
                completion.tokens.append(token)
                if self._on_token:
                    self._on_token(token)
            if completion.has_stopped or len(completion.tokens) == completion.max_new_tokens:
                finished.append(completion)
        return finished

    def _drop_free_slots(self) -> None:
        """Shrink the batch to the rows that are left, as no prompt waits for the free slots."""
        slots = [slot for slot, row in enumerate(self._rows) if row is not None]
        if slots:
            index = torch.tensor(slots, device=self._decoder.device)
            self._cache.keep_rows(slots)
            self._rows = [self._rows[slot] for slot in slots]
            self._last, self._positions, self._live = self._last[index], self._positions[index], self._live[index]
