"""Every held-out row that training repeats is found as its strongest kind; near rows are those of brute force."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from training_lens.data.examples import Example, Message, TokenizedExample
from training_lens.data.leaks import LEAK_KINDS, MOST_ROWS, NO_LEAK, PIECE, find_leaks, find_near_rows
from training_lens.data.row_identity import identify_example
from training_lens.data.token_dataset import TokenDataset
from training_lens.utils.files import hash_bytes


def dataset(rows: Sequence[tuple[str, str]]) -> TokenDataset:
    """Rows of words as tokens, each with its question and answer."""
    made = []
    for number, (question, answer) in enumerate(rows, 1):
        turns = (*([Message("user", question)] if question else []), Message("assistant", answer))
        example = Example(turns, None, "f", number, is_text=not question)
        words = f"{question} {answer}".split()
        ids = np.array([hash_bytes(word.encode()) % 50_000 for word in words], dtype=np.int32)
        digest = hash_bytes("".join(words).encode())
        made.append(
            TokenizedExample("f", number, ids, np.ones(len(ids), bool), None, digest, identify_example(example).columns)
        )
    return TokenDataset.from_examples(made)


STORY = (
    "Once there was a small owl that lived alone in a tall tree near the river and hunted mice at night until one day "
    "it met an old fox who knew each path through the wood and who told it of a barn with many more"
)
KNOWN = [
    ("How many apples has Tom?", "Four."),
    ("Where does the old man live?", "In the hall."),
    (STORY, "It was happy."),
    ("", "A plain text of the river."),
    ("Where does the old man live?", "By the lake."),
]


@pytest.mark.parametrize(
    ("row", "kind", "partner"),
    [
        (("How many apples has  Tom? ", "Four."), "exact", 0),
        (("So, how many apples has TOM", "four"), "normalized", 0),
        (("Where does the old man live?", "by the lake"), "normalized", 4),
        (("How many apples has Tom?", "Five."), "question", 0),
        ((STORY.replace("mice", "rats"), "It was happy."), "near", 2),
        (("", "a plain text of the River"), "normalized", 3),
        (("Where does the old cat live?", "In the hall."), None, NO_LEAK),
        (("", "Another text of the river."), None, NO_LEAK),
    ],
)
def test_each_kind(row: tuple[str, str], kind: str | None, partner: int) -> None:
    found = find_leaks(dataset(KNOWN), dataset([row]))
    assert found.partners.tolist() == [partner]
    assert {name: n for name, n in found.counts.items() if n} == ({kind: 1} if kind else {})
    assert tuple(found.counts) == LEAK_KINDS


def brute_force(train: TokenDataset, held_out: TokenDataset) -> list[bool]:
    def pieces(ids: np.ndarray) -> set[tuple[int, ...]]:
        return {tuple(ids[i : i + PIECE].tolist()) for i in range(len(ids) - PIECE + 1)}

    known, asked = ([pieces(e.input_ids) for e in each] for each in (train, held_out))
    alike = [max(len(a & b) / len(a | b) if a | b else 0.0 for b in known) for a in asked]
    return [similarity >= 0.8 for similarity in alike]


def test_near_rows_are_those_of_a_brute_force_count() -> None:
    rng = np.random.default_rng(0)
    train_ids = [rng.integers(0, 500, rng.integers(20, 60)).astype(np.int32) for _ in range(40)]
    held = []
    for ids in train_ids:
        changed = ids.copy()
        places = rng.choice(len(ids), rng.integers(0, 4), replace=False)
        changed[places] = 501
        held.append(changed[: len(ids) - rng.integers(0, 4)])
    sides = [
        TokenDataset.from_examples(
            [TokenizedExample("f", i, ids, np.ones(len(ids), bool), None) for i, ids in enumerate(side)]
        )
        for side in (train_ids, held)
    ]
    found = find_near_rows(*sides)
    wanted = brute_force(*sides)
    assert 5 < sum(wanted) < 35 and (found >= 0).tolist() == wanted
    assert [place for place in found.tolist() if place >= 0] == [i for i, near in enumerate(wanted) if near]


@pytest.mark.parametrize("count", [12, MOST_ROWS + 10])
def test_what_a_template_repeats_makes_no_row_near(count: int) -> None:
    template = "Below is an instruction that describes a task and you shall answer it well and truly now"
    rows = [(f"{template} {i} {i * 7}", f"{i * 3}") for i in range(count)]
    assert (find_near_rows(dataset(rows[:-5]), dataset(rows[-5:])) < 0).all()
