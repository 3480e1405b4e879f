"""Answers to prompts: one streamed, or many in batches, greedy or sampled.

A greedy answer is token for token what the model's own `generate` gives for that prompt alone: padding is masked, and
neither attention nor the sampler sees it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message
from training_lens.errors import ConfigurationError, OutOfMemoryError
from training_lens.inference.decode_loop import DecodeLoop, Decoder
from training_lens.inference.decoder import log_once
from training_lens.inference.fallback_generate import count_batch_rows, generate_padded, needs_long_factors
from training_lens.inference.sampler import Completion, Sampler, generation_options
from training_lens.inference.session import Session
from training_lens.utils.devices import keep_freed_memory
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
SEED_STRIDE = 0x9E3779B1  # odd, about 2**32 over the golden ratio: near draws and seeds land far apart


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer as text and as tokens, without its stop token."""

    text: str
    token_ids: Sequence[int]
    finish_reason: Literal["stop", "length"]  # length: cut by `max_new_tokens` or the model's positions


def answer(
    session: Session,
    prompt_ids: Sequence[int],
    settings: InferenceSection,
    *,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The answer to one prompt from `Session.prompt_ids`; with `base`, that of the base model without the adapter.

    `on_text` gets its text while the tokens are generated.
    """
    return generate_answer(session, prompt_ids, settings, base=base, on_text=on_text).text


def generate_answer(
    session: Session,
    prompt_ids: Sequence[int],
    settings: InferenceSection,
    *,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> GeneratedAnswer:
    """The answer to one prompt, and how it ended; arguments are those of `answer`.

    `on_token` gets each token before its text; an error that it raises ends the generation there.
    """
    torch.manual_seed(settings.seed)
    streamer = _make_streamer(session, on_text) if on_text else None

    def pass_on(token: int) -> None:
        if on_token:
            on_token(token)
        if streamer:
            streamer.put(torch.tensor([token]))

    call = _plan_call(session, settings, base, prompt_ids, pass_on if streamer or on_token else None)
    (completion,) = _complete_prompts(call, [prompt_ids])
    if streamer:
        streamer.end()
    return _make_answer(session, completion)


def _make_streamer(session: Session, on_text: Callable[[str], None]) -> Any:
    """Transformers' streamer, which holds a token back until its characters are complete."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Streamer(session.tokenizer, skip_special_tokens=True)


def answer_texts(
    session: Session,
    prompts: str | Sequence[str],
    settings: InferenceSection,
    *,
    base: bool = False,
    domain: str | None = None,
) -> str | list[str]:
    """The answer to a text, or a list of answers to a list of texts. Logs how many were cut.

    Raises:
        ConfigurationError: a prompt is not a text, is empty, or leaves no room for an answer.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    _require_texts(texts)
    ids = [session.prompt_ids([Message("user", text)], domain) for text in texts]
    if isinstance(prompts, str):
        generated = [generate_answer(session, ids[0], settings, base=base)]
    else:
        generated = generate_answers(session, ids, settings, base=base)
    if cut := sum(answer.finish_reason == "length" for answer in generated):
        logger.info(
            "%d of %d answers were cut at max_new_tokens (%d), or at the model's last position",
            cut, len(generated), settings.max_new_tokens,
        )  # fmt: skip
    return generated[0].text if isinstance(prompts, str) else [answer.text for answer in generated]


def _require_texts(texts: Sequence[object]) -> None:
    if not isinstance(texts, Sequence):
        raise ConfigurationError(f"a prompt is a text, or a list of texts; given {type(texts).__name__}.")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ConfigurationError(f"prompt {number} is a {type(text).__name__}, expected a text.")
        if not text.strip():
            raise ConfigurationError(f"prompt {number} is empty; give some text.")


def answers(
    session: Session,
    prompts: Sequence[Sequence[int]],
    settings: InferenceSection,
    *,
    base: bool = False,
    draw: int = 0,
    advance: Callable[[float], None] = lambda _done: None,
) -> list[str]:
    """The texts of many answers, in the prompts' order; arguments and errors are those of `generate_answers`."""
    generated = generate_answers(session, prompts, settings, base=base, draw=draw, advance=advance)
    return [answer.text for answer in generated]


def generate_answers(
    session: Session,
    prompts: Sequence[Sequence[int]],
    settings: InferenceSection,
    *,
    base: bool = False,
    draw: int = 0,
    advance: Callable[[float], None] = lambda _done: None,
) -> list[GeneratedAnswer]:
    """Many answers, in the prompts' order, and how each ended.

    Prompts are batched under `settings.batch_tokens`, longest first, and the next takes the slot of one that is
    finished. If memory runs out, batches are half as large from then on.

    Args:
        draw: with the seed, decides what is sampled: calls of one job that differ in it sample differently.
        advance: called with the number of prompts finished since the last call.

    Raises:
        ConfigurationError: a prompt takes all of the model's positions; OutOfMemoryError: one alone does not fit.
    """
    torch.manual_seed((settings.seed + draw * SEED_STRIDE) % 2**32)  # the CPU's generator takes 32 bits
    if not prompts:
        return []
    call = _plan_call(session, settings, base, max(prompts, key=len))
    return [_make_answer(session, completion) for completion in _complete_prompts(call, prompts, advance)]


def prepare_batch(
    session: Session, prompts: Sequence[Sequence[int]], max_new_tokens: int, on_token: Callable[[int], None]
) -> Callable[[], list[Sequence[int]]]:
    """Greedy answers to prompts of one length, all in one batch, as `generate_answers` makes them: to be timed.

    They are made without drafts, so that every step gives every prompt one token, whatever the answers say.

    What it returns generates them and gives their tokens; the decoder is built before. Where memory runs out, that is
    raised.

    Args:
        on_token: called with each token, those of a step in the order of the prompts.
    """
    settings = InferenceSection(max_new_tokens=max_new_tokens, temperature=0.0, drafts="off")
    call = _plan_call(session, settings, False, prompts[0], on_token)

    def generate() -> list[Sequence[int]]:
        completions = [call.start_completion(prompt, max_new_tokens) for prompt in prompts]
        with keep_freed_memory():
            for _ in call.complete_first(completions, len(completions)):
                pass
        return [completion.tokens for completion in completions]

    return generate


@dataclass(frozen=True)
class _GenerationCall:
    """What answers the prompts of a call: the decode loop, or without a decoder the model's own `generate`."""

    session: Session
    settings: InferenceSection
    base: bool
    options: dict[str, Any]
    sampler: Sampler
    decoder: Decoder | None
    on_token: Callable[[int], None] | None  # called with each token

    def start_completion(self, prompt: Sequence[int], max_new_tokens: int) -> Completion:
        drafts = self.sampler.start_drafts(self.settings)
        return Completion(prompt, max_new_tokens, self.session.stop_ids, self.on_token, drafts=drafts)

    def count_rows(self, waiting: Sequence[Completion], budget: int) -> int:
        """How many prompts, the longest first, go together in `budget` tokens; at least one."""
        if self._choose_decoder(waiting):
            return min(len(waiting), max(1, budget // waiting[0].max_length))
        return count_batch_rows(self.session, waiting, budget)

    def _choose_decoder(self, waiting: Sequence[Completion]) -> Decoder | None:
        """The decoder, unless the longest prompt comes to need other rotary factors, which it cannot change."""
        return None if needs_long_factors(self.session, waiting[0].max_length) else self.decoder

    @torch.inference_mode()
    def complete_first(self, waiting: Sequence[Completion], rows: int) -> Iterator[list[Completion]]:
        """Answer the first prompts that wait, `rows` at a time; yields completions as they finish."""
        decoder = self._choose_decoder(waiting)
        if decoder is None:
            generate_padded(self.session, waiting[:rows], self.options, self.base, self.on_token)
            yield list(waiting[:rows])
            return
        # The decoder computes in the weights' own dtype, also where a run answers during its training.
        with torch.autocast(self.session.device.type, enabled=False):
            yield from DecodeLoop(decoder, self.sampler, waiting, rows).run()


def _plan_call(
    session: Session,
    settings: InferenceSection,
    base: bool,
    prompt: Sequence[int],
    on_token: Callable[[int], None] | None = None,
) -> _GenerationCall:
    """The call, with the session's decoder where that supports the model and the settings.

    A new decoder is verified on the tokens of `prompt`.
    """
    options = generation_options(settings, session.stop_ids, session.pad_id)
    sampler = Sampler(session.model, options, session.device)
    if unsupported := sampler.unsupported_option:
        log_once(f"answers come from the model's own generate: its generation config asks for {unsupported}")
    decoder = None if unsupported else session.decoders.get_decoder(session.model, base, prompt)
    return _GenerationCall(session, settings, base, options, sampler, decoder, on_token)


@keep_freed_memory()
def _complete_prompts(
    call: _GenerationCall, prompts: Sequence[Sequence[int]], advance: Callable[[float], None] = lambda _done: None
) -> list[Completion]:
    """The completions; arguments and errors are those of `generate_answers`."""
    completions, positions = list[Completion](), call.session.positions or sys.maxsize
    for prompt in prompts:
        if len(prompt) >= positions:
            raise ConfigurationError(
                f"a prompt has {len(prompt)} tokens, the model {positions} positions: no room to answer. Shorten it."
            )
        completions.append(call.start_completion(prompt, min(call.settings.max_new_tokens, positions - len(prompt))))
    waiting = sorted(completions, key=lambda c: -len(c.prompt))
    budget = call.settings.batch_tokens
    while waiting:
        rows, width = call.count_rows(waiting, budget), waiting[0].max_length
        done: set[Completion] = set()
        try:
            for finished in call.complete_first(waiting, rows):
                done.update(finished)
                advance(len(finished))
        except Exception as error:  # memory runs out by several kinds of error
            _raise_unless_fewer_rows_help(error, rows, width)
            if budget == call.settings.batch_tokens:
                logger.warning("memory ran out with %d prompts together, so fewer: %s", rows, describe_error(error))
            budget = rows // 2 * width
        waiting = [completion for completion in waiting if completion not in done]
        for completion in waiting:
            completion.restart()
    return completions


def _raise_unless_fewer_rows_help(error: Exception, rows: int, width: int) -> None:
    """Raise again what is not a lack of memory; where one row did not fit, an error that says so."""
    if not is_out_of_memory(error):
        raise error
    if rows == 1:
        raise OutOfMemoryError(
            f"not enough memory for one prompt with its answer ({width} tokens): {describe_error(error)} Give a "
            "smaller max_new_tokens, a shorter prompt, or load fewer bits (model.dtype=bf16, model.quantization=4bit)."
        ) from error


def _make_answer(session: Session, completion: Completion) -> GeneratedAnswer:
    text = str(session.tokenizer.decode(completion.tokens, skip_special_tokens=True))
    return GeneratedAnswer(text, completion.tokens, "stop" if completion.has_stopped else "length")
