"""Answers to prompts: one streamed, or many in batches, greedy or sampled.

A greedy answer is token for token what the model's own `generate` gives for that prompt alone: padding is masked and
seen by nothing that chooses a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.errors import ConfigurationError, OutOfMemoryError
from training_lens.inference.by_generate import changes_factors, generate, rows_together
from training_lens.inference.decode_loop import Decoder, Decoding, slots
from training_lens.inference.decoder import say_once
from training_lens.inference.sampler import Answer, Choice
from training_lens.inference.session import Session
from training_lens.utils.formatting import describe_error
from training_lens.utils.heap import keep_freed_memory
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
FinishReason = Literal["stop", "length"]
SPREAD = 0x9E3779B1  # odd, about 2**32 over the golden ratio: near draws and seeds land far apart


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer as text and as tokens, without the token that ended it.

    `finish_reason`: `stop` where the model ended it, `length` where `max_new_tokens` or the model's positions cut it.
    """

    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason


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
    return generate_answer(session, prompt_ids, settings, base=base, on_text=on_text).text


def generate_answer(
    session: Session,
    prompt_ids: Sequence[int],
    settings: InferenceSection,
    *,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> GeneratedAnswer:
    """The answer to one prompt, and how it ended; arguments are those of `answer`."""
    torch.manual_seed(settings.seed)
    stream = _stream(session, on_text) if on_text else None
    put = (lambda token: stream.put(torch.tensor([token]))) if stream else None
    (given,) = _answered(_call(session, settings, base, prompt_ids, put), [prompt_ids])
    if stream:
        stream.end()
    return _result(session, given)


def _stream(session: Session, on_text: Callable[[str], None]) -> Any:
    """Transformers' streamer, which holds a token back until its characters are whole."""
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Stream(session.tokenizer, skip_special_tokens=True)


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
    given = generate_answers(session, prompts, settings, base=base, draw=draw, advance=advance)
    return [answer.text for answer in given]


def answer_ids(
    session: Session,
    prompts: Sequence[Sequence[int]],
    settings: InferenceSection,
    *,
    base: bool = False,
    draw: int = 0,
    advance: Callable[[float], None] = lambda _done: None,
) -> list[list[int]]:
    """The tokens of many answers, each without the token that ended it; see `generate_answers`."""
    return [given.tokens for given in _given(session, prompts, settings, base, draw, advance)]


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

    Prompts go together, longest first, under `settings.batch_tokens`, and the next takes the place of one that is
    finished. Where the memory cannot hold them, half as many go together from then on.

    Args:
        draw: with the seed, decides what is sampled: calls of one job that differ in it draw apart.
        advance: called with the number of prompts that are done since it was called last.

    Raises:
        ConfigurationError: a prompt takes all of the model's positions; OutOfMemoryError: one alone does not fit.
    """
    return [_result(session, given) for given in _given(session, prompts, settings, base, draw, advance)]


def _given(
    session: Session,
    prompts: Sequence[Sequence[int]],
    settings: InferenceSection,
    base: bool,
    draw: int,
    advance: Callable[[float], None],
) -> list[Answer]:
    torch.manual_seed((settings.seed + draw * SPREAD) % 2**32)  # the CPU's generator takes 32 bits
    if not prompts:
        return []
    return _answered(_call(session, settings, base, max(prompts, key=len)), prompts, advance)


@dataclass(frozen=True)
class _Call:
    """What a call's prompts are answered with; without a decoder, by the model's own `generate`.

    `put` hears of each token, where there is one prompt.
    """

    session: Session
    settings: InferenceSection
    base: bool
    options: dict[str, Any]
    choose: Choice
    decoder: Decoder | None
    put: Callable[[int], None] | None

    def rows(self, waiting: Sequence[Answer], budget: int) -> int:
        """How many go together in `budget` tokens."""
        return slots(waiting, budget) if self._decoder_of(waiting) else rows_together(self.session, waiting, budget)

    def _decoder_of(self, waiting: Sequence[Answer]) -> Decoder | None:
        """The decoder, unless the first, the longest, needs other rotary factors on its way, which it cannot change."""
        first = waiting[0]
        return None if changes_factors(self.session, len(first.prompt) + first.room) else self.decoder

    @torch.inference_mode()
    def some(self, waiting: Sequence[Answer], rows: int) -> Iterator[list[Answer]]:
        """Answer the first of those that wait, `rows` at a time; each lot as it is finished."""
        decoder = self._decoder_of(waiting)
        if decoder is None:
            generate(self.session, waiting[:rows], self.options, self.base, self.put)
            yield list(waiting[:rows])
            return
        # The weights' own number type is what the decoder computes in, as when the run is asked after its training.
        with torch.autocast(self.session.device.type, enabled=False):
            yield from Decoding(decoder, self.choose, waiting, rows, self.session.stop_ids, self.put).run()


def _call(
    session: Session,
    settings: InferenceSection,
    base: bool,
    prompt: Sequence[int],
    put: Callable[[int], None] | None = None,
) -> _Call:
    """The call, with the session's decoder where that covers model and settings.

    Args:
        prompt: real tokens, on which a new decoder is tried.
    """
    options = _options(session, settings)
    choose = Choice(session.model, options, session.device)
    if choose.uncovered:
        say_once(f"answers come from the model's own generate: its generation config asks for {choose.uncovered}")
    decoder = None if choose.uncovered else session.decoders.get(session.model, base, prompt)
    return _Call(session, settings, base, options, choose, decoder, put)


@keep_freed_memory()
def _answered(
    call: _Call, prompts: Sequence[Sequence[int]], advance: Callable[[float], None] = lambda _done: None
) -> list[Answer]:
    """The answers; arguments and errors are those of `generate_answers`."""
    everything = [_asked(call, index, prompt) for index, prompt in enumerate(prompts)]
    waiting = sorted(everything, key=lambda a: -len(a.prompt))
    budget = call.settings.batch_tokens
    while waiting:
        rows, width = call.rows(waiting, budget), len(waiting[0].prompt) + waiting[0].room
        done: set[Answer] = set()
        try:
            for finished in call.some(waiting, rows):
                done.update(finished)
                advance(len(finished))
        except Exception as error:  # memory runs out by several kinds of error
            _refuse_what_halving_cannot_mend(error, rows, width)
            if budget == call.settings.batch_tokens:
                logger.warning("memory ran out with %d prompts together, so fewer: %s", rows, describe_error(error))
            budget = rows // 2 * width
        waiting = [_begun_again(answer) for answer in waiting if answer not in done]
    return everything


def _asked(call: _Call, index: int, prompt: Sequence[int]) -> Answer:
    """With the room that the model's positions leave."""
    most, positions = call.settings.max_new_tokens, call.session.positions
    if positions and len(prompt) >= positions:
        raise ConfigurationError(
            f"a prompt has {len(prompt)} tokens, the model {positions} positions: no room to answer. Shorten it."
        )
    return Answer(index, prompt, min(most, positions - len(prompt)) if positions else most)


def _begun_again(answer: Answer) -> Answer:
    answer.tokens.clear()
    answer.has_ended = False
    return answer


def _refuse_what_halving_cannot_mend(error: Exception, rows: int, width: int) -> None:
    """Raise again what is no lack of memory; where one row did not fit, say so."""
    if not is_out_of_memory(error):
        raise error
    if rows == 1:
        raise OutOfMemoryError(
            f"not enough memory for one prompt with its answer ({width} tokens): {describe_error(error)} Give a "
            "smaller max_new_tokens, a shorter prompt, or load fewer bits (model.dtype=bf16, model.quantization=4bit)."
        ) from error


def _options(session: Session, settings: InferenceSection) -> dict[str, Any]:
    """The settings as `generate` takes them; temperature 0 is greedy."""
    ends = {
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_id": sorted(session.stop_ids),
        "pad_token_id": session.pad_id,
    }
    if settings.temperature == 0:
        return {"do_sample": False, **ends}
    return {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k or 0,
        **ends,
    }


def _text(session: Session, ids: Sequence[int]) -> str:
    return str(session.tokenizer.decode(ids, skip_special_tokens=True))


def _result(session: Session, given: Answer) -> GeneratedAnswer:
    return GeneratedAnswer(_text(session, given.tokens), given.tokens, "stop" if given.has_ended else "length")
