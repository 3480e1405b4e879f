"""Decoding: rows that each grow by a token a step, and make room for the next prompt when they are finished.

Prompts are read in batches, a beginning that all share once. From then on a row is one place of a `SlotCache`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from training_lens.inference.sampler import Answer, Choice
from training_lens.models.fast.decoder_stack import DecoderStack
from training_lens.models.fast.kv_cache import FULL, SLIDING, SlotCache

SHARED = 16  # tokens: a shorter beginning is not worth a pass of its own
NARROWER = 2  # a prompt so many times narrower than the widest waits for rows of its own size
CPU_TOKENS = 512  # of prompts read at a time: more would only make tensors that no cache holds
SLACK = 4  # a quarter of the columns more than one row takes: so seldom are they moved


@dataclass(frozen=True)
class Decoder:
    """A model as decoding asks it.

    `windows`: of each layer, None for one that sees all. `keeps_last`: the model takes `logits_to_keep`. `stack`: its
    pass through our layers alone, where that says the same.
    """

    model: Any
    windows: tuple[int | None, ...]
    keeps_last: bool
    dtype: torch.dtype
    device: torch.device
    stack: DecoderStack | None = None

    def logits(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor] | None, cache: Cache) -> Tensor:
        """Scores of what follows the last token of each row, (rows, vocabulary); the cache takes the tokens.

        Args:
            ids, positions: (rows, tokens) int64.
            masks: of each kind of layers, added to the scores; None: causal, without padding.
        """
        if self.stack:
            return self.stack.logits(ids, positions, masks, cache)
        mask = masks if masks is None or len(masks) > 1 else next(iter(masks.values()))
        last = {"logits_to_keep": 1} if self.keeps_last else {}
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **last
        )
        scores: Tensor = out.logits[:, -1]
        return scores


@dataclass(frozen=True)
class Beginning:
    """What all prompts begin with, read once: `length` tokens, and their keys and values in one row; or nothing."""

    length: int
    read: Cache | None

    def repeated(self, rows: int) -> DynamicCache:
        """A cache in which so many rows have read it."""
        cache = DynamicCache()
        for index, layer in enumerate(self.read.layers if self.read else ()):
            cache.update(*(x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values)), index)
        return cache


def read_beginning(decoder: Decoder, prompts: Sequence[list[int]]) -> Beginning:
    """Read what the prompts have in common, but for the last token of each, where that is long enough to pay."""
    first, last = min(prompts), max(prompts)  # in order of their tokens: what these two share, all do
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = min(same, min(map(len, prompts)) - 1)
    if len(prompts) < 2 or length < SHARED:
        return Beginning(0, None)
    return Beginning(length, read(decoder, [first[:length]], Beginning(0, None))[1])


def read(decoder: Decoder, prompts: Sequence[Sequence[int]], beginning: Beginning) -> tuple[Tensor, Cache]:
    """The scores after each prompt, (rows, vocabulary), and the cache, padded between the beginning and the rest."""
    rests = [list(prompt[beginning.length :]) for prompt in prompts]
    width = max(map(len, rests))
    pads = torch.tensor([width - len(rest) for rest in rests], device=decoder.device)
    ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=decoder.device)
    places = torch.arange(width, device=decoder.device) - pads[:, None]  # (rows, width)
    cache = beginning.repeated(len(prompts))
    plain = beginning.length == 0 and not pads.any() and all(w is None or width <= w for w in decoder.windows)
    masks = None if plain else _prompt_masks(decoder, pads, places, beginning.length)
    return decoder.logits(ids, (places + beginning.length).clamp_min(0), masks, cache), cache


def _prompt_masks(decoder: Decoder, pads: Tensor, places: Tensor, shared: int) -> dict[str, Tensor]:
    """What is added to the scores while prompts are read: (rows, 1, width, shared + width), of each kind of layers."""
    width = places.shape[1]
    columns = torch.arange(width, device=places.device)
    causal = columns <= columns[:, None]
    rest = (columns >= pads[:, None])[:, None] & causal  # (rows, width, width)
    seen = torch.cat([rest.new_ones(len(pads), width, shared), rest], dim=-1)
    before = torch.arange(shared, device=places.device).expand(len(pads), -1)
    positions = torch.cat([before, places + shared], dim=-1)  # (rows, shared + width)
    distance = positions[:, None, shared:].transpose(1, 2) - positions[:, None]  # (rows, width, shared + width)
    masks = {}
    for window in set(decoder.windows):
        visible = seen if window is None else seen & (distance < window)
        mask = torch.zeros(visible.shape, dtype=decoder.dtype, device=places.device)
        masks[FULL if window is None else SLIDING] = mask.masked_fill(~visible, torch.finfo(decoder.dtype).min)[:, None]
    return masks


def slots(waiting: Sequence[Answer], budget: int) -> int:
    """How many rows as wide as the first answer go together in `budget` tokens; at least one."""
    return min(len(waiting), max(1, budget // _width(waiting[0])))


def _width(answer: Answer) -> int:
    return len(answer.prompt) + answer.room


class Decoding:
    """Answers under way, in `rows` places.

    Args:
        waiting: the widest first. They are taken as places become free, up to the first that is so much narrower
            than the first of all that it had better wait for more places.
        stops: a token of these ends an answer, and is none of it.
        on_token: hears of each token of an answer.
    """

    def __init__(
        self,
        decoder: Decoder,
        choose: Choice,
        waiting: Sequence[Answer],
        rows: int,
        stops: frozenset[int],
        on_token: Callable[[int], None] | None = None,
    ) -> None:
        self._decoder, self._choose, self._stops, self._on_token = decoder, choose, stops, on_token
        widest = _width(waiting[0])
        self._waiting = deque(a for a in waiting if NARROWER * _width(a) > widest)
        self._beginning = read_beginning(decoder, [list(a.prompt) for a in self._waiting])
        self._budget = min(rows * widest, CPU_TOKENS) if decoder.device.type == "cpu" else rows * widest
        self._rows: list[Answer | None] = [None] * rows
        columns = widest + (widest // SLACK if len(self._waiting) > rows else 0)
        self._cache = SlotCache(rows, columns, decoder.windows, decoder.dtype, decoder.device)
        self._cache.columns.end = max(len(a.prompt) for a in self._waiting)
        self._last = torch.zeros(rows, dtype=torch.int64, device=decoder.device)
        self._positions, self._live = torch.zeros_like(self._last), torch.zeros_like(self._last)

    def run(self) -> Iterator[list[Answer]]:
        """The answers as they are finished."""
        while self._waiting or any(self._rows):
            if self._waiting and self._is_room():
                yield from self._fill()
            elif not self._waiting and 2 * sum(row is not None for row in self._rows) <= len(self._rows):
                self._shrink()
            if any(self._rows) and (finished := self._step()):
                yield finished

    def _is_room(self) -> bool:
        """Whether so many places are free that a pass over prompts pays."""
        free = self._rows.count(None)
        return free >= min(len(self._waiting), max(1, len(self._rows) // 8))

    def _fill(self) -> Iterator[list[Answer]]:
        """Read prompts into the free places, in batches that the budget of tokens allows."""
        free = [place for place, row in enumerate(self._rows) if row is None]
        while free and self._waiting:
            width = len(self._waiting[0].prompt)
            count = min(len(free), len(self._waiting), max(1, self._budget // width))
            batch = [self._waiting.popleft() for _ in range(count)]
            scores, cache = read(self._decoder, [a.prompt for a in batch], self._beginning)
            tokens = self._choose(scores, batch)
            finished = self._took(batch, tokens.tolist())
            for i, answer in enumerate(batch):
                if answer not in finished:
                    self._seat(free.pop(0), answer, cache, i, tokens[i])
            if finished:
                yield finished

    def _seat(self, place: int, answer: Answer, cache: Cache, i: int, token: Tensor) -> None:
        self._cache.write_prompt(place, cache, i, self._beginning.length, len(answer.prompt))
        self._rows[place] = answer
        self._last[place], self._positions[place], self._live[place] = token, len(answer.prompt), 1

    def _step(self) -> list[Answer]:
        """Every row's next token; those that are finished with it."""
        self._cache.open_column()
        masks = self._cache.attention_masks()
        scores = self._decoder.logits(self._last[:, None], self._positions[:, None], masks, self._cache)
        self._last = self._choose(scores, self._rows)
        self._positions += self._live
        finished = self._took(self._rows, self._last.tolist())  # where this waits for the device, once a step
        for answer in finished:
            self._leave(self._rows.index(answer))
        return finished

    def _leave(self, place: int) -> None:
        self._rows[place] = None
        self._cache.release_row(place)
        self._positions[place] = self._live[place] = 0  # a place without answer must not run out of positions

    def _took(self, rows: Sequence[Answer | None], tokens: Sequence[int]) -> list[Answer]:
        """Give each answer its token; those that end with it."""
        finished = []
        for answer, token in zip(rows, tokens, strict=True):
            if answer is None:
                continue
            answer.has_ended = token in self._stops
            if not answer.has_ended:
                answer.tokens.append(token)
                if self._on_token:
                    self._on_token(token)
            if answer.has_ended or len(answer.tokens) == answer.room:
                finished.append(answer)
        return finished

    def _shrink(self) -> None:
        """Nobody waits for the places that are free: go on without them."""
        places = [place for place, row in enumerate(self._rows) if row is not None]
        if places:
            index = torch.tensor(places, device=self._decoder.device)
            self._cache.keep_rows(places)
            self._rows = [self._rows[place] for place in places]
            self._last, self._positions, self._live = self._last[index], self._positions[index], self._live[index]
