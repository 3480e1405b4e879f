"""The decode loop with continuous batching: each row grows by a token a step, and a finished row frees its slot.

Prompts are prefilled in batches, a prefix that all share only once (prefix caching). From then on a row is one slot of
the KV cache (`SlotCache`), and the next prompt takes a slot that has become free. Where few rows decode, greedy ones
grow by several tokens a step, as many as their drafts have right (speculative decoding).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from training_lens.inference.sampler import Completion
from training_lens.models.fast.decoder_stack import DecoderStack
from training_lens.models.fast.kv_cache import FULL, SLIDING, SlotCache
from training_lens.models.fast.row_adapters import RowAdapters

MIN_SHARED_TOKENS = 16  # a shorter prefix is not worth a forward pass of its own
MAX_LENGTH_RATIO = 2  # a prompt that is shorter than the longest by this factor waits for rows of its own size
FEW_ROWS = 8  # that all fit go together: a decoding step of them takes hardly more time than one of a single row
CPU_PREFILL_TOKENS = 512  # prefilled at a time: more would only make tensors that no CPU cache holds
# Slots that take drafts: a step of more is bound by computing, and each refused token costs what it brings. With the
# longest drafts these are as many rows of a product as `FewRowsLinear.MOST`, which gives each the same bits as alone.
MOST_DRAFTING_ROWS = 4


class TokenSampler(Protocol):
    """What chooses the next token of each row."""

    def sample_next_token(self, logits: Tensor, rows: Sequence[Completion | None]) -> Tensor:
        """(rows,) int64 from logits (rows, vocabulary); arbitrary for an empty row."""


@dataclass(frozen=True)
class Decoder:
    """A model as the decode loop calls it."""

    model: Any
    windows: tuple[int | None, ...]  # the attention window of each layer, None for full attention
    keeps_last: bool  # whether the model takes `logits_to_keep`
    dtype: torch.dtype
    device: torch.device
    stack: DecoderStack | None = None  # the forward pass through our own layers, where it gives the same logits
    paths: Mapping[int, str] = field(default_factory=dict)  # of the layers that its fused ones were built of, by id
    adapters: RowAdapters | None = None  # beside the weights, of which each row has its own

    def compute_logits(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor] | None, cache: Cache) -> Tensor:
        """Logits after the last token of each row, (rows, vocabulary); the tokens are added to the KV cache.

        `ids` and `positions` are (rows, tokens) int64. The mask of each kind of layer is added to its attention scores;
        None: causal, without padding. With a `SlotCache` they are the tokens of its step, (tokens, 1), and it has the
        masks; only the stack computes several tokens of a slot.
        """
        if self.stack:
            return self.stack.logits(ids, positions, masks, cache)
        if isinstance(cache, SlotCache):
            masks = cache.attention_masks()
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


NO_PREFIX = SharedPrefix()


def prefill_shared_prefix(decoder: Decoder, prompts: Sequence[list[int]]) -> SharedPrefix:
    """Prefill what the prompts share, without the last token of each, if it is long enough to pay."""
    first, last = min(prompts), max(prompts)  # in the order of their tokens: what these two share, all do
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = min(same, min(map(len, prompts)) - 1)
    if len(prompts) < 2 or length < MIN_SHARED_TOKENS:
        return NO_PREFIX
    return SharedPrefix(length, prefill(decoder, [first[:length]], NO_PREFIX)[1])


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


class DecodeBatch:
    """Rows that decode together, each in a slot of the KV cache. A row may join or leave between any two steps.

    Args:
        rows, columns: slots, and tokens that each holds; both grow where they must.
    """

    def __init__(self, decoder: Decoder, sampler: TokenSampler, rows: int, columns: int) -> None:
        self._decoder, self._sampler = decoder, sampler
        self.rows: list[Completion | None] = [None] * rows
        self._cache = SlotCache(rows, columns, decoder.windows, decoder.dtype, decoder.device)

    @property
    def completions(self) -> list[Completion]:
        """The rows that are decoded."""
        return [row for row in self.rows if row is not None]

    @property
    def free_slots(self) -> int:
        return self.rows.count(None)

    @property
    def columns(self) -> int:
        """The tokens that each slot holds."""
        return self._cache.columns.count

    def resize_columns(self, columns: int) -> None:
        """Hold so many tokens a slot, or as many as the longest row has."""
        self._cache.resize_columns(columns)

    def prefill_rows(self, batch: Sequence[Completion], prefix: SharedPrefix = NO_PREFIX) -> list[Completion]:
        """Prefill prompts together, and give each its first token and a slot; returns those finished with it."""
        if (missing := len(batch) - self.free_slots) > 0:
            self._add_slots(missing)
        self._select_adapters(batch)
        logits, cache = prefill(self._decoder, [c.prompt for c in batch], prefix)
        tokens = self._sampler.sample_next_token(logits, batch)
        finished = [row for row, token in zip(batch, tokens.tolist(), strict=True) if row.add_token(token)]
        for i, completion in enumerate(batch):
            if completion not in finished:
                slot = self.rows.index(None)
                self._cache.write_prompt(slot, cache, i, prefix.length, len(completion.prompt))
                self.rows[slot] = completion
        return finished

    def step(self) -> list[Completion]:
        """One more token for every row, and those that its draft has right; returns the rows that are finished.

        The tokens that follow a draft's are computed together with the next one. Those up to the first that is not the
        model's own choice are the row's, and so is the choice there.
        """
        drafts = self._draft_tokens()
        ids = [[row.tokens[-1], *draft] if row else [0] for row, draft in zip(self.rows, drafts, strict=True)]
        rows = [row for row, own in zip(self.rows, ids, strict=True) for _ in own]  # of each token
        positions = self._cache.open_tokens(list(map(len, ids)))
        self._select_adapters(rows)
        tokens = torch.tensor([token for own in ids for token in own], device=self._decoder.device)
        logits = self._decoder.compute_logits(tokens[:, None], positions[:, None], None, self._cache)
        chosen = iter(self._sampler.sample_next_token(logits, rows).tolist())  # the one sync point of a step
        finished = []
        for slot, (row, draft) in enumerate(zip(list(self.rows), drafts, strict=True)):
            choices = [next(chosen) for _ in (0, *draft)]
            if row and self._add_choices(slot, row, draft, choices):
                finished.append(row)
        return finished

    def _draft_tokens(self) -> list[list[int]]:
        """The draft of each slot, empty where there is none."""
        if self._decoder.stack is None or len(self.rows) > MOST_DRAFTING_ROWS:
            return [[] for _ in self.rows]
        return [row.draft_tokens() if row else [] for row in self.rows]

    def _add_choices(self, slot: int, row: Completion, draft: Sequence[int], choices: Sequence[int]) -> bool:
        """Give a row the choices after its last token and after each accepted one; whether it is finished with them."""
        accepted = next((i for i, token in enumerate(draft) if token != choices[i]), len(draft))
        added = next((i for i, token in enumerate(choices[:accepted], 1) if row.add_token(token)), 0)
        is_finished = added > 0 or row.add_token(choices[accepted])
        row.note_step(len(draft), accepted, len(choices) - (added or accepted + 1))
        if is_finished:
            self.remove_row(row)
        else:
            self._cache.keep_tokens(slot, accepted + 1)
        return is_finished

    def remove_row(self, completion: Completion) -> None:
        """Free the slot of a row."""
        slot = self.rows.index(completion)
        self.rows[slot] = None
        self._cache.release_row(slot)

    def drop_free_slots(self) -> None:
        """Shrink to the slots that hold a row."""
        slots = [slot for slot, row in enumerate(self.rows) if row is not None]
        self._cache.keep_rows(slots)
        self.rows = [self.rows[slot] for slot in slots]

    def _add_slots(self, count: int) -> None:
        self._cache.add_rows(count)
        self.rows += [None] * count

    def _select_adapters(self, rows: Sequence[Completion | None]) -> None:
        """Free slots are computed as the first row is, so that rows of one adapter are computed without a choice."""
        if self._decoder.adapters:
            first = next(row.adapter for row in rows if row is not None)
            self._decoder.adapters.select_rows([first if row is None else row.adapter for row in rows])


class DecodeLoop:
    """Decodes completions in `rows` slots by continuous batching.

    Args:
        waiting: the longest first. They are taken as slots become free, up to the first that is so much shorter than
            the longest that it had better wait for more slots.
    """

    def __init__(self, decoder: Decoder, sampler: TokenSampler, waiting: Sequence[Completion], rows: int) -> None:
        longest = waiting[0].max_length
        all_fit = len(waiting) <= min(rows, FEW_ROWS)
        self._waiting = deque(c for c in waiting if all_fit or MAX_LENGTH_RATIO * c.max_length > longest)
        self._prefix = prefill_shared_prefix(decoder, [list(c.prompt) for c in self._waiting])
        self._budget = min(rows * longest, CPU_PREFILL_TOKENS) if decoder.device.type == "cpu" else rows * longest
        self._batch = DecodeBatch(decoder, sampler, rows, longest)

    def run(self) -> Iterator[list[Completion]]:
        """Yield completions as they finish."""
        while self._waiting or self._batch.completions:
            slots, free = len(self._batch.rows), self._batch.free_slots
            enough = min(len(self._waiting), max(1, slots // 8))  # free slots, for a prefill to pay
            if self._waiting and free >= enough:
                yield from self._prefill_free_slots()
            elif not self._waiting and 2 * (slots - free) <= slots:
                self._batch.drop_free_slots()
            if self._batch.completions and (finished := self._batch.step()):
                yield finished

    def _prefill_free_slots(self) -> Iterator[list[Completion]]:
        """Prefill prompts into the free slots, in batches within the token budget."""
        free = self._batch.free_slots
        while free and self._waiting:
            width = len(self._waiting[0].prompt)
            count = min(free, len(self._waiting), max(1, self._budget // width))
            finished = self._batch.prefill_rows([self._waiting.popleft() for _ in range(count)], self._prefix)
            free -= count - len(finished)
            if finished:
                yield finished
