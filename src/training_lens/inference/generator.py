"""Answers to prompts: one streamed, or many in batches, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from training_lens.config.schema import InferenceSection
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only

SPREAD = 0x9E3779B1  # odd, about 2**32 over the golden ratio: near draws and seeds land far apart


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
    return _generate(session, [prompt_ids], settings, base, streamer)[0]


def answers(
    session: Session,
    prompts: Sequence[Sequence[int]],
    settings: InferenceSection,
    *,
    base: bool = False,
    draw: int = 0,
    advance: Callable[[float], None] = lambda _done: None,
) -> list[str]:
    """Answers to many prompts, in their order; prompts of like length go together, under `settings.batch_tokens`.

    Args:
        draw: with the seed, decides what is sampled: calls of one job that differ in it draw apart.
        advance: called with the number of prompts done.
    """
    torch.manual_seed((settings.seed + draw * SPREAD) % 2**32)  # the CPU's generator takes 32 bits
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(prompts)
    while order:
        rows = _rows_in_batch(session, len(prompts[order[0]]) + settings.max_new_tokens, settings.batch_tokens)
        batch, order = order[:rows], order[rows:]
        for i, text in zip(batch, _generate(session, [prompts[i] for i in batch], settings, base), strict=True):
            texts[i] = text
        advance(len(batch))
    return texts


def _rows_in_batch(session: Session, width: int, batch_tokens: int) -> int:
    """How many go together; one that the model's positions may cut short goes alone, so as not to cut others."""
    if session.positions and width > session.positions:
        return 1
    return max(1, batch_tokens // width)


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
    settings: InferenceSection,
    base: bool,
    streamer: Any = None,
) -> list[str]:
    """Left-padded generation; the padding is masked, so its id never matters."""
    width = max(len(p) for p in prompts)
    room = session.positions - width if session.positions else settings.max_new_tokens
    input_ids = torch.full((len(prompts), width), session.pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[row, width - len(prompt) :] = 1
    with torch.inference_mode(), base_only(session.model, base):
        out = session.model.generate(
            input_ids=input_ids.to(session.device),
            attention_mask=attention_mask.to(session.device),
            max_new_tokens=min(settings.max_new_tokens, room),
            eos_token_id=sorted(session.stop_ids),
            pad_token_id=session.pad_id,
            streamer=streamer,
            **_options(settings),
        )
    return [
        session.tokenizer.decode(_until_stop(row, session.stop_ids), skip_special_tokens=True)
        for row in out[:, width:].tolist()
    ]


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in stop_ids), ids)
