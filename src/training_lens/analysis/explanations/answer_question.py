"""The answer that is explained: its tokens after its prompt, from the adapter, the user, or a row of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from training_lens.analysis.explanations.answer_changes import AnswerSource
from training_lens.analysis.explanations.training_rows import suggest_row
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Example, Message, TextSegment
from training_lens.data.source_reader import read_examples
from training_lens.data.token_pipeline import encode_training_prompt, tokenize
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.inference.generator import GeneratedAnswer, generate_answer
from training_lens.inference.heldout_examples import find_changed_sources
from training_lens.inference.session import Session
from training_lens.models.token_scores import last_logits
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.devices import autocast
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class AnswerQuestion:
    """What is explained: `prompt`, or the prompt of the row `row` (FILE:NUMBER, as in all reports).

    `answer` is a given text; None: the adapter's greedy answer, or with `own_answer` the row's own. `token` is the one
    of the answer that is looked at, from 0; None: the one with the largest change.
    """

    prompt: str | None = None
    row: str | None = None
    answer: str | None = None
    own_answer: bool = False
    domain: str | None = None
    token: int | None = None

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ConfigurationError: there is no prompt or two, an answer is empty or given twice.
        """
        if (self.prompt is None) == (self.row is None):
            raise ConfigurationError("explain answer takes a prompt or --row ID: give one of them.")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigurationError("the prompt is empty; give some text.")
        if self.answer is not None and not self.answer.strip():
            raise ConfigurationError("--answer is empty; give some text, or leave it out for the adapter's own answer.")
        if self.own_answer and (self.row is None or self.answer is not None):
            raise ConfigurationError(
                "--own-answer is the answer of --row, instead of --answer; give it with --row alone."
            )
        if self.row is not None and self.domain is not None:
            raise ConfigurationError("--domain goes with a prompt: a row has its own domain. Leave it out.")


@dataclass(frozen=True)
class AnswerText:
    """A prompt and an answer as tokens; `places` are those of the answer's tokens in `ids`, both (n,) int64."""

    prompt: str
    row: str | None
    domain: str | None
    answer: str
    source: AnswerSource
    ids: np.ndarray
    places: np.ndarray
    base: GeneratedAnswer | None  # what each model says by itself; None for a plain text, which has no prompt
    adapter: GeneratedAnswer | None


def find_row(run: RunFolder | None, session: Session, row_id: str, others: Iterable[object] = ()) -> Example:
    """The row with an id (FILE:NUMBER) among a run's or config's validation and training rows, and those of `others`.

    Raises:
        ConfigurationError: there is none; names the one that is meant.
    """
    data, seen = session.config.data, list[str]()
    specs = [("data.validation", list(others)), ("data.validation", data.validation_sources or [])]
    for key, sources in (*specs, ("data.train", data.train)):
        for example in read_examples(sources, key, data) if sources else ():
            if example.id == row_id:
                if run:
                    _warn_of_change(run, data.train if key == "data.train" else sources, key, example)
                return example
            if not seen or example.row == 1 or Path(example.id).name == Path(row_id).name:
                seen.append(example.id)
    raise ConfigurationError(
        f"--row {row_id}: there is no such row. An id is a file as the run recorded it and a row number."
        f"{suggest_row(row_id, seen)} Add data.validation=FILE for rows of another file."
    )


def _warn_of_change(run: RunFolder, sources: Iterable[object], key: str, example: Example) -> None:
    for name in find_changed_sources(run, list(sources), key.removeprefix("data.")):
        if name == example.file:
            logger.warning("%s: has changed since the run read it; the row is what stands there now", name)


def build_answer(
    session: Session, question: AnswerQuestion, example: Example | None, settings: InferenceSection
) -> AnswerText:
    """The answer's tokens after its prompt, and what base and adapter say to the prompt by themselves.

    Args:
        example: the row that `question` names.
        settings: `max_new_tokens` of the greedy answers.

    Cost: two greedy answers.

    Raises:
        ConfigurationError: the prompt or the answer leaves no room; DatasetError: the row has nothing to explain.
    """
    if example is not None and example.is_text:
        return _read_text(session, example)
    if example is None:
        messages: tuple[Message, ...] = (Message("user", question.prompt or ""),)
        prompt_ids, domain = session.prompt_ids(messages, question.domain), question.domain
    else:
        messages, domain = example.messages[:-1], example.domain
        prompt_ids = encode_training_prompt(example, session.preparation)
    greedy = settings.model_copy(update={"temperature": 0.0})
    base, adapter = (generate_answer(session, prompt_ids, greedy, base=of_base) for of_base in (True, False))
    if question.own_answer and example is not None:
        answer, source = example.messages[-1].text, "row"
        ids, places = _encode_row(session, example)
    elif question.answer is not None:
        answer, source = question.answer, "given"
        ids, places = _encode_given(session, messages, domain, question.answer, example)
    else:
        answer, source = adapter.text, "greedy"
        end = [_find_stop_token(session, [*prompt_ids, *adapter.token_ids])] if adapter.finish_reason == "stop" else []
        ids = np.array([*prompt_ids, *adapter.token_ids, *end], np.int64)
        places = np.arange(len(prompt_ids), len(ids))
    _check_length(session, ids, places)
    prompt = "\n".join(part for m in messages for part in (m.text, m.input) if part)
    row = example.id if example else None
    return AnswerText(prompt, row, domain, answer, source, ids, places, base, adapter)  # type: ignore[arg-type]


def _read_text(session: Session, example: Example) -> AnswerText:
    """A plain text, all of which is explained."""
    ids, places = _encode_row(session, example)
    return AnswerText("", example.id, example.domain, example.messages[-1].text, "row", ids, places, None, None)


def _encode_row(session: Session, example: Example) -> tuple[np.ndarray, np.ndarray]:
    """A row's tokens as training has them, and the places of its last answer's."""
    (tokens,) = tokenize([example], session.preparation)
    if tokens is None:
        raise DatasetError(
            f"--row {example.id}: nothing of its answer fits model.seq_len={session.preparation.seq_len}, so training "
            "leaves it out. Give another row."
        )
    places = np.flatnonzero(tokens.loss_mask)
    breaks = np.flatnonzero(np.diff(places) > 1)
    last = places if example.is_text or not len(breaks) else places[breaks[-1] + 1 :]
    return tokens.input_ids.astype(np.int64), last[last > 0]


def _encode_given(
    session: Session, messages: tuple[Message, ...], domain: str | None, answer: str, example: Example | None
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a given answer as training would have them, with its end token; a text continues without one."""
    if session.continues_text:
        text = "\n".join(part for m in messages for part in (m.text, m.input) if part)
        segments = [*session.renderer.render_text_prompt(text, domain), TextSegment(answer, True, plain=True)]
    else:
        turns = (*messages, Message("assistant", answer))
        whole = replace(example, messages=turns) if example else Example(turns, domain, "", 0)
        segments = session.renderer.render_example(whole)
    encoded = session.encoder.encode([segments])[0]
    places = np.flatnonzero(encoded.response)
    breaks = np.flatnonzero(np.diff(places) > 1)
    return encoded.input_ids.astype(np.int64), places[breaks[-1] + 1 :] if len(breaks) else places


def _find_stop_token(session: Session, ids: list[int]) -> int:
    """The stop token that the adapter holds likeliest after these tokens."""
    with autocast(session.device, session.precision):
        logits = last_logits(session.model, torch.tensor([ids], device=session.device))
    return max(session.stop_ids, key=lambda stop: float(logits[stop]) if stop < len(logits) else -np.inf)


def _check_length(session: Session, ids: np.ndarray, places: np.ndarray) -> None:
    if not len(places):
        raise DatasetError("the answer has no token, so there is nothing to explain. Give another with --answer.")
    if session.positions and len(ids) > session.positions:
        raise ConfigurationError(
            f"prompt and answer have {len(ids)} tokens, the model {session.positions} positions. Shorten the answer."
        )


def read_pieces(session: Session, ids: Iterable[int]) -> list[str]:
    """The text of each token, so that joined they are the text of all; a token within a character has none."""
    return list(_iterate_pieces(session, list(ids)))


def _iterate_pieces(session: Session, ids: list[int]) -> Iterator[str]:
    """Decoding all tokens up to each, because a token alone may lose its blank or half of a character."""
    before = ""
    for count in range(1, len(ids) + 1):
        text = str(session.tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        whole = text.rstrip("\ufffd")
        yield whole[len(before) :] if whole.startswith(before) else ""
        before = whole if whole.startswith(before) else before
