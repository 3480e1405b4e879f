"""What the planted suite trains: a case, the kinds of failure that are planted into it, and healthy controls."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Row = dict[str, str]
Rows = list[Row]
Stage = Literal["before", "during", "after"]
Sections = Mapping[str, Mapping[str, Any]]
STAGES: tuple[Stage, ...] = ("before", "during", "after")


@dataclass(frozen=True)
class Case:
    """One run that will be trained.

    `loop` trains it in another loop than ours: see `other_loops`. `is_planned`: its plan is asked first, as `validate`
    does, which may be enough. `seed` draws rows, strengths and the run's own
    randomness. `scratch` is a folder for what a kind writes, such as a broken base.
    """

    data_set: str
    train: Rows
    validation: Rows
    base: Path
    sections: Sections
    seed: int
    scratch: Path
    loop: Callable[..., Any] | None = None
    is_planned: bool = True

    @property
    def random(self) -> random.Random:
        """A generator that is the same at each call: a kind draws once."""
        return random.Random(self.seed)

    def change(self, **sections: Mapping[str, Any]) -> Case:
        """The case with keys of the config replaced: `case.change(training={"lr": 1e-3})`."""
        names = {*self.sections, *sections}
        return replace(self, sections={n: {**self.sections.get(n, {}), **sections.get(n, {})} for n in names})

    def with_train(self, rows: Rows) -> Case:
        """The case with other training rows."""
        return replace(self, train=rows)

    def with_answers(self, answers: list[str]) -> Case:
        """The case with other answers to its training rows."""
        return self.with_train([{**row, "output": a} for row, a in zip(self.train, answers, strict=True)])

    def shuffle(self, rows: Rows) -> Rows:
        """Copies of the rows in an order that the seed draws."""
        copies = [dict(row) for row in rows]
        self.random.shuffle(copies)
        return copies

    def map_rows(self, alter: Callable[[Row], Row]) -> Case:
        """The case with each training and validation row altered."""
        return replace(self, train=[*map(alter, self.train)], validation=[*map(alter, self.validation)])


@dataclass(frozen=True)
class Answer:
    """A finding that is right about a kind.

    Args:
        code: of the finding.
        title: a pattern that its title must match; then a severity of `fine` counts as well ("Converged").
        test: a pattern that `decide` or `action` of an inconclusive finding must match: the test that would settle it.
            Empty: inconclusive is not an answer.
    """

    code: str
    title: str = ""
    test: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of failure.

    Args:
        name: of the kind.
        what: one line for the table.
        answers: the findings that are right; the first one is the one that the kind is counted for.
        plant: makes the failing case out of a healthy one, at a strength.
        tuned: the strength at which thresholds may be tuned.
        reported: the strength that is reported.
        refusal: a pattern of the error that a refusal or stop of this kind shows, and of a warning in the log.
        denied_by: codes whose `fine` would be false; None: those of the answers.
        earliest: when it can be seen at the earliest.
    """

    name: str
    what: str
    answers: tuple[Answer, ...]
    plant: Callable[[Case, Any], Case]
    tuned: Any
    reported: Any
    refusal: str = ""
    denied_by: tuple[str, ...] | None = None
    earliest: Stage = "after"

    @property
    def deniers(self) -> tuple[str, ...]:
        """Codes whose `fine` is false about this kind."""
        return tuple(answer.code for answer in self.answers) if self.denied_by is None else self.denied_by


@dataclass(frozen=True)
class Control:
    """A healthy run: nothing may be reported as a problem or a warning.

    `build` makes the case from a seed and a scratch folder; `true` are codes of warnings that are true of these rows.
    """

    name: str
    build: Callable[[int, Path], Case]
    true: tuple[str, ...] = field(default=())
