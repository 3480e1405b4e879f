"""Rows as one session evaluates them: tokens, prompts, right answers, bytes of text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from training_lens.data.columns import EncodedRow
from training_lens.data.examples import Example, TextSegment, TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import encode_training_prompt, tokenize
from training_lens.errors import DatasetError
from training_lens.inference.session import Session
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class EvaluationRows:
    """Rows that fit the session's model; `kept` are their indices among those given.

    `prompts` are the tokens before each row's last answer. They are None for a plain text, and where the row is too
    long to leave any prompt, or any position for an answer. `references` are the texts of the last answers.
    `text_bytes` (int64) are the UTF-8 bytes of each row's supervised text, `tokens_id` (uint64) is a hash of its
    supervised tokens.
    """

    examples: list[Example]
    kept: np.ndarray
    dataset: TokenDataset
    prompts: list[list[int] | None]
    references: list[str]
    text_bytes: np.ndarray
    tokens_id: np.ndarray

    @classmethod
    def from_examples(cls, examples: Sequence[Example], session: Session) -> EvaluationRows:
        """The rows of `examples` that fit the model.

        Raises:
            DatasetError: none fits.
        """
        tokenized = tokenize(examples, session.preparation)
        kept = np.array([i for i, tokens in enumerate(tokenized) if tokens is not None], dtype=np.int64)
        if not len(kept):
            raise DatasetError(
                f"none of the {len(examples)} rows to evaluate has an answer within model.seq_len="
                f"{session.preparation.seq_len} tokens of {session.source}; give other rows."
            )
        fitting = [t for t in tokenized if t is not None]
        rows = [_RenderedExample.from_example(examples[i], session) for i in kept]
        prompts = [_build_prompt(row.example, session) for row in rows]
        _warn_without_prompt(rows, prompts)
        return cls(
            [row.example for row in rows],
            kept,
            TokenDataset.from_examples(fitting),
            prompts,
            [row.reference_text(session) for row in rows],
            np.array([row.text_bytes(t, session) for row, t in zip(rows, fitting, strict=True)], dtype=np.int64),
            np.array([_hash_tokens(t.input_ids[t.loss_mask]) for t in fitting], dtype=np.uint64),
        )

    def take(self, places: np.ndarray) -> EvaluationRows:
        """The rows at these indices, in this order."""
        return EvaluationRows(
            [self.examples[i] for i in places],
            self.kept[places],
            self.dataset.select(places),
            [self.prompts[i] for i in places],
            [self.references[i] for i in places],
            self.text_bytes[places],
            self.tokens_id[places],
        )

    def count_distinct(self) -> int:
        """How many rows differ in their tokens."""
        return len({example.input_ids.tobytes() for example in self.dataset})

    @property
    def prompt_references(self) -> list[str]:
        """The right answers of the rows with a prompt."""
        return [self.references[i] for i in np.flatnonzero(self.has_prompt)]

    @property
    def has_prompt(self) -> np.ndarray:
        """Which rows have a prompt, (rows,) bool."""
        return np.array([prompt is not None for prompt in self.prompts], dtype=bool)


@dataclass(frozen=True)
class _RenderedExample:
    """An example with its text and all its tokens, before truncation."""

    example: Example
    segments: list[TextSegment]
    whole: EncodedRow

    @classmethod
    def from_example(cls, example: Example, session: Session) -> _RenderedExample:
        segments = session.renderer.render_example(example)
        return cls(example, segments, session.encoder.encode([segments])[0])

    def reference_text(self, session: Session) -> str:
        """The text of the last answer; tool calls are written as in the template."""
        last = self.example.messages[-1]
        if not last.calls:
            return last.text
        ids = _masked_runs(self.whole.input_ids, self.whole.response)[-1]
        return str(session.tokenizer.decode(ids, skip_special_tokens=True))

    def text_bytes(self, kept: TokenizedExample, session: Session) -> int:
        """UTF-8 bytes of the supervised text without special tokens; of a truncated row, of its tokens' text."""
        if len(kept.input_ids) == len(self.whole.input_ids):
            learned = (s for s in self.segments if s.response or not session.config.data.mask_prompt)
            return sum(len(_without_specials(s, session).encode()) for s in learned)
        parts = _masked_runs(kept.input_ids, kept.loss_mask)
        return sum(len(session.tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in parts)


def _without_specials(segment: TextSegment, session: Session) -> str:
    """The text of a segment without special tokens; in plain text, their names are ordinary text."""
    text = segment.text
    for name in () if segment.plain else session.tokenizer.all_special_tokens:
        text = text.replace(name, "")
    return text


def _masked_runs(ids: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """The contiguous runs of tokens that the mask marks."""
    runs = groupby(range(len(ids)), key=lambda i: bool(mask[i]))
    return [ids[list(places)].tolist() for marked, places in runs if marked]


def _build_prompt(example: Example, session: Session) -> list[int] | None:
    """The prompt as training truncates it; None where nothing of it is left, or no position for an answer."""
    if example.is_text:
        return None
    ids = encode_training_prompt(example, session.preparation)
    nothing = all(token == session.encoder.bos_id for token in ids)
    return None if nothing or (session.positions and len(ids) >= session.positions) else ids


def _warn_without_prompt(rows: Sequence[_RenderedExample], prompts: Sequence[list[int] | None]) -> None:
    silent = [r.example.id for r, p in zip(rows, prompts, strict=True) if p is None and not r.example.is_text]
    if silent:
        logger.warning(
            "%d rows are evaluated by their loss alone: their answers leave no room for a prompt, or their prompts "
            "none for an answer; the first is %s", len(silent), silent[0],
        )  # fmt: skip


def _hash_tokens(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "big")
