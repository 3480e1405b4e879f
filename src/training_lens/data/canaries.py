"""Canaries: made-up rows with a random secret, planted a known number of times to measure what a run memorizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from training_lens.data.examples import Example, Message, TokenizedExample
from training_lens.data.token_pipeline import Preparation, tokenize
from training_lens.errors import DatasetError

SOURCE = "canary"  # the source of their row ids: canary:1, canary:2, ...
QUESTION, ANSWER = "What is the code of locker {locker}?", "The code is {code}."
DIGITS = 8  # of a code, apart by blanks, so that most tokenizers give each a token and all codes equally many
LOCKERS = 10_000  # lockers have numbers of five digits from here on
_STREAM = 2**33  # keeps the draws apart from those of rows and of splits


@dataclass(frozen=True)
class Canary:
    """One canary: its number from 1, how often an epoch visits it (0: it is never planted), and its row."""

    number: int
    repeats: int
    question: str
    answer: str

    @property
    def id(self) -> str:
        """The id of its row."""
        return f"{SOURCE}:{self.number}"

    def as_example(self, answer: str | None = None) -> Example:
        """Its row, or the same row with another answer."""
        messages = (Message("user", self.question), Message("assistant", answer or self.answer))
        return Example(messages, None, SOURCE, self.number)


@dataclass(frozen=True)
class Canaries:
    """The canaries of a run: those that it plants, and as many of the same form that it does not, to compare with."""

    seed: int
    rows: tuple[Canary, ...]

    @classmethod
    def draw(cls, each: int, repeats: Sequence[int], seed: int) -> Canaries:
        """`each` canaries for every number of repeats, and as many that are never planted. Depends on these alone."""
        generator = np.random.Generator(np.random.PCG64([seed, _STREAM]))
        groups = [*repeats, 0]
        lockers = LOCKERS + generator.choice(9 * LOCKERS, each * len(groups), replace=False)
        rows = [
            Canary(number, groups[place // each], QUESTION.format(locker=locker), draw_answer(generator))
            for place, (number, locker) in enumerate(enumerate(lockers.tolist(), 1))
        ]
        return cls(seed, tuple(rows))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Canaries:
        """Those of `as_record`."""
        return cls(record["seed"], tuple(Canary(**row) for row in record["rows"]))

    def as_record(self) -> dict[str, Any]:
        """As a run's metadata/data.json keeps them."""
        return {"seed": self.seed, "question": QUESTION, "answer": ANSWER, "rows": [asdict(row) for row in self.rows]}

    def tokenize_planted(self, preparation: Preparation) -> list[TokenizedExample]:
        """The examples to plant, each as often as it repeats.

        Raises:
            DatasetError: model.seq_len leaves no room for them.
        """
        planted = [row for row in self.rows if row.repeats]
        found = tokenize([row.as_example() for row in planted], preparation)
        if None in found:
            raise DatasetError(
                f"data.canaries: the canary '{planted[0].question} {planted[0].answer}' does not fit model.seq_len="
                f"{preparation.seq_len}. Raise it, or plant none (data.canaries=0)."
            )
        pairs = zip(planted, found, strict=True)
        return [example for row, example in pairs if example is not None for _ in range(row.repeats)]


def draw_answer(generator: np.random.Generator) -> str:
    """The answer with a random code."""
    return ANSWER.format(code=" ".join(map(str, generator.integers(0, 10, DIGITS).tolist())))


def draw_candidates(canary: Canary, candidates: int, seed: int) -> list[str]:
    """`candidates` - 1 other answers of the same form, all different: with the canary's own they are the set R."""
    generator = np.random.Generator(np.random.PCG64([seed, _STREAM, canary.number]))
    others: dict[str, None] = {}
    while len(others) < candidates - 1:
        if (answer := draw_answer(generator)) != canary.answer:
            others[answer] = None
    return list(others)
