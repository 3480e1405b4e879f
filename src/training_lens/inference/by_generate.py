"""Answers from a model's own `generate`, for models and settings that `decoding` does not cover: padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from training_lens.inference.sampler import Answer
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only
from training_lens.models.rotary import longest_short_sequence

COUNTING = ("no_repeat_ngram_size", "min_length")  # of a model's generation config: they count padding as text


def rows_together(session: Session, waiting: Sequence[Answer], budget: int) -> int:
    """How many of the prompts, whose lengths fall, go together in `budget` tokens.

    One that the model's positions may cut short goes alone, so as not to cut others, and so does one that may become
    too long for a long-rope model's short factors: transformers reads it anew there, by its padded length. Where the
    model's generation config counts padding as text, only prompts of one length go together.
    """
    first = waiting[0]
    width = len(first.prompt) + max(answer.room for answer in waiting)
    if (session.positions and width > session.positions) or changes_factors(session, width):
        return 1
    rows = min(len(waiting), max(1, budget // width))
    if any(getattr(session.model.generation_config, name) for name in COUNTING):
        return min(rows, sum(len(answer.prompt) == len(first.prompt) for answer in waiting))
    return rows


def changes_factors(session: Session, width: int) -> bool:
    """Whether a prompt with its answer, `width` tokens together, needs a long-rope model's long factors."""
    limit = longest_short_sequence(session.model)
    return limit is not None and width > limit


def generate(
    session: Session,
    answers: Sequence[Answer],
    options: dict[str, Any],
    base: bool,
    on_token: Callable[[int], None] | None = None,
) -> None:
    """Give each answer its tokens, up to what ended it.

    Args:
        options: for `generate`, as keywords.
        on_token: hears of the tokens of the one answer.
    """
    prompts = [answer.prompt for answer in answers]
    width = max(map(len, prompts))
    input_ids, attention_mask = _left_padded(prompts, session.pad_id)
    options = options | {"max_new_tokens": answers[0].room}
    with torch.inference_mode(), base_only(session.model, base):
        out = session.model.generate(
            input_ids=input_ids.to(session.device),
            attention_mask=attention_mask.to(session.device),
            streamer=_Listener(on_token, session.stop_ids) if on_token else None,
            **options,
        )
    for answer, row in zip(answers, out[:, width:].tolist(), strict=True):
        answer.tokens = _until_stop(row, session.stop_ids)
        answer.has_ended = len(answer.tokens) < len(row)


class _Listener:
    """Hands on each token that `generate` streams, after the prompt and before what ends the answer."""

    def __init__(self, on_token: Callable[[int], None], stops: frozenset[int]) -> None:
        self._on_token, self._stops, self._is_prompt = on_token, stops, True

    def put(self, tokens: torch.Tensor) -> None:
        for token in [] if self._is_prompt else tokens.flatten().tolist():
            if token not in self._stops:
                self._on_token(token)
        self._is_prompt = False

    def end(self) -> None:
        pass


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of the prompts, (rows, longest) int64."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in stop_ids), ids)
