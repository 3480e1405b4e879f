"""Failures of answers and splits: validation rows among the training rows, and answers that are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from planted_case import Answer, Case, Kind, Row


def _leak(alter: Callable[[Row], Row]) -> Callable[[Case, float], Case]:
    """A share of the validation rows, altered, in the place of training rows."""

    def plant(case: Case, share: float) -> Case:
        leaked = case.validation[: math.ceil(share * len(case.validation))]
        return case.with_train(case.shuffle([*map(alter, leaked), *case.train[len(leaked) :]]))

    return plant


def _prefix(row: Row) -> Row:
    asked = row["instruction"]
    return {**row, "instruction": f"So, {asked[:1].lower()}{asked[1:]}"}


def leak_question(case: Case, share: float) -> Case:
    """Validation questions in the training rows, with the answers of other rows."""
    leaked = case.validation[: math.ceil(share * len(case.validation))]
    others = case.train[-len(leaked) :]
    rows = [{**row, "output": other["output"]} for row, other in zip(leaked, others, strict=True)]
    return case.with_train(case.shuffle([*rows, *case.train[len(leaked) :]]))


def leak_all(case: Case, share: float) -> Case:
    """Every validation row is a training row."""
    return replace(case, validation=case.train[: round(share * len(case.validation))])


def random_labels(case: Case, share: float) -> Case:
    """Answers of random words, as long as the right ones."""
    drawn = case.random
    words = sorted({word for row in case.train for word in row["output"].split()})
    spoilt = [" ".join(drawn.choices(words, k=len(row["output"].split()))) for row in case.train]
    return case.with_answers(
        [s if drawn.random() < share else row["output"] for row, s in zip(case.train, spoilt, strict=True)]
    )


def shifted_labels(case: Case, rows: int) -> Case:
    """Each answer is that of the row so many before."""
    answers = [row["output"] for row in case.train]
    return case.with_answers(answers[-rows:] + answers[:-rows])


def shuffled_labels(case: Case, share: float) -> Case:
    """A share of the rows exchange their answers."""
    drawn = case.random
    chosen = drawn.sample(range(len(case.train)), round(share * len(case.train)))
    answers = [row["output"] for row in case.train]
    for here, there in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        answers[here] = case.train[there]["output"]
    return case.with_answers(answers)


def contradicting_labels(case: Case, share: float) -> Case:
    """A share of the prompts stands twice, with two answers."""
    pairs = round(share * len(case.train) / 2)
    first, rest = case.train[:pairs], case.train[pairs:]
    twice = [{**row, "output": other["output"]} for row, other in zip(first, rest[:pairs], strict=True)]
    return case.with_train(case.shuffle([*first, *twice, *rest[pairs:]]))


LEAK, LEAKED = (Answer("leaks"),), "validation examples are training examples"
LABELS = (Answer("prompt_ignored", test="prompt"), Answer("label_disagreement"))
NOISE = (Answer("label_noise", test="30 random training rows"), *LABELS)
KINDS = (
    Kind(
        "leak_exact",
        "validation rows stand in the training rows",
        LEAK,
        _leak(dict),
        0.5,
        0.25,
        LEAKED,
        earliest="before",
    ),
    Kind(
        "leak_total",
        "every validation row is a training row",
        LEAK,
        leak_all,
        1.0,
        0.5,
        LEAKED,
        earliest="before",
    ),
    Kind(
        "leak_space",
        "leaked rows with a trailing space",
        LEAK,
        _leak(lambda r: {k: v + " " for k, v in r.items()}),
        0.5,
        0.25,
        LEAKED,
        earliest="before",
    ),
    Kind(
        "leak_case",
        "leaked rows in another case",
        LEAK,
        _leak(lambda r: {k: v.upper() for k, v in r.items()}),
        0.5,
        0.25,
        LEAKED,
        earliest="before",
    ),
    Kind(
        "leak_prefix",
        "leaked rows that begin with “So, ...”",
        LEAK,
        _leak(_prefix),
        0.5,
        0.25,
        LEAKED,
        earliest="before",
    ),
    Kind(
        "leak_question",
        "validation questions with other answers",
        LEAK,
        leak_question,
        0.5,
        0.25,
        LEAKED,
        earliest="before",
    ),
    Kind("labels_random", "answers of random words", LABELS, random_labels, 0.8, 1.0),
    Kind("labels_shifted", "answers shifted by a row", NOISE, shifted_labels, 3, 1),
    Kind("labels_shuffled", "answers shuffled over all rows", NOISE, shuffled_labels, 0.9, 1.0),
    Kind("labels_noise", "30 % of the answers are another row's", NOISE[:1], shuffled_labels, 0.5, 0.3),
    Kind(
        "labels_contradict",
        "the same prompts with two answers",
        LABELS[::-1],
        contradicting_labels,
        0.6,
        0.4,
        earliest="before",
    ),
)
