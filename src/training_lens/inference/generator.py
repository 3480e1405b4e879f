"""Answers to prompts: one streamed, or many in batches, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from training_lens.config.schema import InferenceSection
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only


def answer(
    session: Session,
    prompt_ids: Sequence[int],
    settings: InferenceSection,
    *,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The answer to one prompt, its tokens handed to `on_text` as text while they come.

    Args:
        prompt_ids: from `Session.prompt_ids`.
        base: answer as the base model, without the adapter.
    """
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None and text:
                on_text(text)

    streamer = Stream(session.tokenizer, skip_prompt=True, skip_special_tokens=True) if on_text else None
    torch.manual_seed(settings.seed)
    return _generate(session, [prompt_ids], _options(settings), settings.max_new_tokens, base, streamer)[0]


def answers(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_tokens: int,
    *,
    base: bool = False,
    advance: Callable[[float], None] = lambda _done: None,
) -> list[str]:
    """Greedy answers to many prompts, in their order.

    Args:
        max_tokens: most tokens (padding and new ones included) in one batch; prompts of like length go together.
        advance: called with the number of prompts done.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(prompts)
    while order:
        rows = max(1, max_tokens // (len(prompts[order[0]]) + max_new_tokens))
        batch, order = order[:rows], order[rows:]
        for i, text in zip(
            batch,
            _generate(session, [prompts[i] for i in batch], {"do_sample": False}, max_new_tokens, base),
            strict=True,
        ):
            texts[i] = text
        advance(len(batch))
    return texts


def _options(settings: InferenceSection) -> dict[str, Any]:
    """The settings as `generate` takes them; temperature 0 is greedy."""
    if settings.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k or 0,
    }


def _generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    options: dict[str, Any],
    max_new_tokens: int,
    base: bool,
    streamer: Any = None,
) -> list[str]:
    """Left-padded generation; the padding is masked, so its id never matters."""
    width = max(len(p) for p in prompts)
    input_ids = torch.full((len(prompts), width), session.pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[row, width - len(prompt) :] = 1
    with torch.inference_mode(), base_only(session.model, base):
        out = session.model.generate(
            input_ids=input_ids.to(session.device),
            attention_mask=attention_mask.to(session.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(session.stop_ids),
            pad_token_id=session.pad_id,
            streamer=streamer,
            **options,
        )
    return [
        session.tokenizer.decode(_until_stop(row, session.stop_ids), skip_special_tokens=True)
        for row in out[:, width:].tolist()
    ]


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in stop_ids), ids)
