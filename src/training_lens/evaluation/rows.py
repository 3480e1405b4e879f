"""Rows as one session judges them: their tokens, what the answers should be, and how many bytes of text they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from training_lens.data.preparation import tokenize
from training_lens.data.store import TokenDataset
from training_lens.data.types import Example, TokenizedExample
from training_lens.errors import DatasetError
from training_lens.inference.session import Session


@dataclass(frozen=True)
class JudgedRows:
    """Rows that fit the session's model; `kept` are their places among those given.

    `references` are the last answers' texts; `text_bytes` the UTF-8 bytes of all supervised text of each row.
    """

    examples: list[Example]
    kept: list[int]
    dataset: TokenDataset
    references: list[str]
    text_bytes: np.ndarray  # (rows,) int64

    @classmethod
    def of(cls, examples: Sequence[Example], session: Session) -> JudgedRows:
        """The rows of `examples` that fit.

        Raises:
            DatasetError: none fits.
        """
        tokenized = tokenize(examples, session.preparation)
        kept = [i for i, tokens in enumerate(tokenized) if tokens is not None]
        if not kept:
            raise DatasetError(
                f"none of the {len(examples)} rows to judge has an answer within "
                f"model.seq_len={session.preparation.seq_len} tokens; give other rows."
            )
        fitting = [t for t in tokenized if t is not None]
        texts = [_supervised_texts(t, session) for t in fitting]
        return cls(
            [examples[i] for i in kept],
            kept,
            TokenDataset.of(fitting),
            [_reference(examples[i], text[-1]) for i, text in zip(kept, texts, strict=True)],
            np.array([sum(len(part.encode()) for part in text) for text in texts], dtype=np.int64),
        )

    @property
    def asked(self) -> np.ndarray:
        """Rows that ask for an answer, (rows,) bool: a plain text does not."""
        return np.array([not e.is_text for e in self.examples], dtype=bool)


def _supervised_texts(tokens: TokenizedExample, session: Session) -> list[str]:
    """The text of each stretch of supervised tokens, without special tokens."""
    places = groupby(range(len(tokens.input_ids)), key=lambda i: bool(tokens.loss_mask[i]))
    stretches = [tokens.input_ids[list(places)].tolist() for supervised, places in places if supervised]
    return [session.tokenizer.decode(ids, skip_special_tokens=True) for ids in stretches]


def _reference(example: Example, decoded: str) -> str:
    """What the last answer says; one that calls tools says it as the template writes calls."""
    last = example.messages[-1]
    return decoded if last.calls else last.text
