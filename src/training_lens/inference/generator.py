"""Answers to prompts: one streamed, or many in batches, greedy or sampled.

A greedy answer is token for token what the model's own `generate` gives for that prompt alone: padding is masked and
seen by nothing that chooses a token, and a row that another would cut short goes by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from training_lens.config.judging_sections import InferenceSection
from training_lens.errors import OutOfMemoryError
from training_lens.inference.session import Session
from training_lens.models.adapters import base_only
from training_lens.utils.devices import is_out_of_memory
from training_lens.utils.formatting import said
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
COUNTING = ("no_repeat_ngram_size", "min_length")  # of a model's generation config: they count padding as text
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
    return _text(session, _generate(session, [prompt_ids], settings, base, streamer)[0])


def answers(
    session: Session,
    prompts: Sequence[Sequence[int]],
    settings: InferenceSection,
    *,
    base: bool = False,
    draw: int = 0,
    advance: Callable[[float], None] = lambda _done: None,
) -> list[str]:
    """Answers to many prompts, in their order; arguments and errors are those of `answer_ids`."""
    ids = answer_ids(session, prompts, settings, base=base, draw=draw, advance=advance)
    return [_text(session, row) for row in ids]


def answer_ids(
    session: Session,
    prompts: Sequence[Sequence[int]],
    settings: InferenceSection,
    *,
    base: bool = False,
    draw: int = 0,
    advance: Callable[[float], None] = lambda _done: None,
) -> list[list[int]]:
    """The tokens of many answers, in the prompts' order, each without the token that ended it.

    Prompts of like length go together, under `settings.batch_tokens`; a batch that the memory cannot hold is halved,
    and so are those after it.

    Args:
        draw: with the seed, decides what is sampled: calls of one job that differ in it draw apart.
        advance: called with the number of prompts done.

    Raises:
        OutOfMemoryError: one prompt alone does not fit.
    """
    torch.manual_seed((settings.seed + draw * SPREAD) % 2**32)  # the CPU's generator takes 32 bits
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: list[list[int]] = [[]] * len(prompts)
    budget = settings.batch_tokens
    while order:
        batch = order[: _rows_in_batch(session, [len(prompts[i]) for i in order], settings.max_new_tokens, budget)]
        width = len(prompts[batch[0]]) + settings.max_new_tokens
        try:
            tokens = _generate(session, [prompts[i] for i in batch], settings, base)
        except Exception as error:  # memory runs out by several kinds of error
            _refuse_what_halving_cannot_mend(error, len(batch), width)
            if budget == settings.batch_tokens:
                logger.warning("memory ran out with %d prompts together, so fewer: %s", len(batch), said(error))
            budget = len(batch) // 2 * width
            continue
        for i, row in zip(batch, tokens, strict=True):
            found[i] = row
        order = order[len(batch) :]
        advance(len(batch))
    return found


def _refuse_what_halving_cannot_mend(error: Exception, rows: int, width: int) -> None:
    """Raise again what is no lack of memory; where one row did not fit, say so."""
    if not is_out_of_memory(error):
        raise error
    if rows == 1:
        raise OutOfMemoryError(
            f"not enough memory for one prompt with its answer ({width} tokens): {said(error)} Give a smaller "
            "max_new_tokens, a shorter prompt, or load fewer bits (model.dtype=bf16, model.quantization=4bit)."
        ) from error


def _rows_in_batch(session: Session, lengths: Sequence[int], new_tokens: int, budget: int) -> int:
    """How many of the prompts, whose lengths fall, go together in `budget` tokens.

    One that the model's positions may cut short goes alone, so as not to cut others. Where the model's generation
    config counts padding as text, only prompts of one length go together.
    """
    width = lengths[0] + new_tokens
    if session.positions and width > session.positions:
        return 1
    rows = max(1, budget // width)
    if any(getattr(session.model.generation_config, name) for name in COUNTING):
        return min(rows, lengths.count(lengths[0]))
    return rows


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
) -> list[list[int]]:
    """Left-padded generation: the tokens of each answer, up to what ended it."""
    width = max(len(p) for p in prompts)
    room = session.positions - width if session.positions else settings.max_new_tokens
    input_ids, attention_mask = _left_padded(prompts, session.pad_id)
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
    return [_until_stop(row, session.stop_ids) for row in out[:, width:].tolist()]


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of the prompts, (rows, longest) int64."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in stop_ids), ids)


def _text(session: Session, ids: Sequence[int]) -> str:
    return str(session.tokenizer.decode(ids, skip_special_tokens=True))
