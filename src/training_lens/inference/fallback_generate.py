"""The model's own `generate` in left-padded batches, for models and settings that the decode loop does not cover."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch

from training_lens.inference.sampler import Completion
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only
from training_lens.models.rotary import longest_short_sequence

COUNTING = ("no_repeat_ngram_size", "min_length")  # keys of a generation config that count padding as text


def count_batch_rows(session: Session, waiting: Sequence[Completion], budget: int) -> int:
    """How many of the prompts, the longest first, go together in `budget` tokens.

    A prompt that the model's positions may cut goes alone, so that it cuts no other. So does one that may outgrow a
    long-rope model's short factors: transformers then recomputes it by its padded length. Where the generation config
    counts padding as text, only prompts of one length go together.
    """
    first = waiting[0]
    width = len(first.prompt) + max(completion.max_new_tokens for completion in waiting)
    if (session.positions and width > session.positions) or needs_long_factors(session, width):
        return 1
    rows = min(len(waiting), max(1, budget // width))
    if any(getattr(session.model.generation_config, name) for name in COUNTING):
        return min(rows, sum(len(completion.prompt) == len(first.prompt) for completion in waiting))
    return rows


def needs_long_factors(session: Session, width: int) -> bool:
    """Whether a prompt and its answer, `width` tokens together, need a long-rope model's long factors."""
    limit = longest_short_sequence(session.model)
    return limit is not None and width > limit


def generate_padded(
    session: Session,
    completions: Sequence[Completion],
    options: dict[str, Any],
    base: bool,
    on_token: Callable[[int], None] | None,  # called with each token, those of a step in order
) -> None:
    """Generate the tokens of each completion, up to its stop token, with these options of `generate`."""
    prompts = [list(completion.prompt) for completion in completions]
    width = max(map(len, prompts))
    ids = torch.tensor([[session.pad_id] * (width - len(p)) + p for p in prompts])  # (rows, width), padded at the left
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = options | {"max_new_tokens": completions[0].max_new_tokens}
    with torch.inference_mode(), base_only(session.model, base):
        out = session.model.generate(
            input_ids=ids.to(session.device),
            attention_mask=mask.to(session.device),
            streamer=_TokenStreamer(on_token, session.stop_ids) if on_token else None,
            **options,
        )
    for completion, row in zip(completions, out[:, width:].tolist(), strict=True):
        completion.tokens = list(takewhile(lambda token: token not in session.stop_ids, row))
        completion.has_stopped = len(completion.tokens) < len(row)


class _TokenStreamer:
    """Passes on each token that `generate` streams, after the prompt and before the stop token."""

    def __init__(self, on_token: Callable[[int], None], stops: frozenset[int]) -> None:
        self._on_token, self._stops, self._is_prompt = on_token, stops, True

    def put(self, tokens: torch.Tensor) -> None:
        for token in [] if self._is_prompt else tokens.flatten().tolist():
            if token not in self._stops:
                self._on_token(token)
        self._is_prompt = False

    def end(self) -> None:
        pass
