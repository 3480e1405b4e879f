"""What is done to many examples at once is what would be done to each."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from training_lens.data import columns
from training_lens.data.columns import (
    EncodedRows,
    TokenizedRows,
    Truncation,
    compute_offsets,
    find_learnable_rows,
    truncate_rows,
)
from training_lens.data.examples import TokenizedExample

BOS, END = 1, 2


def drawn(lengths: list[int], seed: int = 0) -> EncodedRows:
    """Rows of these lengths; every second begins with BOS, and about half of the tokens are answers."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 9, sum(lengths)).astype(np.int32)
    offsets = compute_offsets(np.array(lengths))
    starts = offsets[:-1][np.array(lengths) > 0]
    ids[starts[::2]] = BOS
    return EncodedRows(ids, rng.random(len(ids)) < 0.5, offsets)


def cut(ids: list[int], seq_len: int, truncation: Truncation) -> list[int]:
    """One example in at most `seq_len` tokens, as the setting describes it."""
    if len(ids) <= seq_len:
        return ids
    if truncation == "drop":
        return []
    if truncation == "keep_start":
        return ids[:seq_len]
    front = ids[:1] if ids[0] == BOS else []
    return front + ids[len(ids) - (seq_len - len(front)) :]


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start", "drop"])
def test_all_examples_are_cut_as_each_alone(truncation: Truncation) -> None:
    rows = drawn([0, 3, 9, 4, 12, 5, 0, 30])
    fitted = truncate_rows(rows, 4, truncation, BOS)
    for before, after in zip(rows, fitted, strict=True):
        assert after.input_ids.tolist() == cut(before.input_ids.tolist(), 4, truncation)
        marked = cut(list(range(len(before.response))), 4, truncation) if len(before.input_ids) else []
        if truncation != "keep_end":
            assert after.response.tolist() == before.response[marked].tolist()


def test_answers_keep_their_marks_behind_the_cut() -> None:
    rows = drawn([9, 9])
    fitted = truncate_rows(rows, 4, "keep_end", BOS)
    assert fitted[0].response.tolist() == rows[0].response[[0, 6, 7, 8]].tolist()
    assert fitted[1].response.tolist() == rows[1].response[5:].tolist()


def test_what_fits_is_not_touched() -> None:
    rows = drawn([3, 4])
    assert truncate_rows(rows, 4, "keep_end", BOS) is rows


def test_learnable_is_an_answer_with_more_than_end_tokens() -> None:
    ids = [[5, 6, 7], [5, 6, END], [6, 5, 5], []]
    response = [[False, True, True], [False, False, True], [True, False, False], []]
    lengths = np.array([len(each) for each in ids])
    rows = EncodedRows(
        np.concatenate(ids).astype(np.int32), np.concatenate(response).astype(bool), compute_offsets(lengths)
    )
    # the third's only answer token is its first, which nothing predicts
    assert find_learnable_rows(rows, {END}).tolist() == [True, False, False, False]


def test_columns_give_back_the_examples_they_were_made_of() -> None:
    rng = np.random.default_rng(0)
    made = [
        TokenizedExample("f", i, np.arange(n, dtype=np.int32), rng.random(n) < 0.5, "ab"[i % 2] if i % 3 else None, i)
        for i, n in enumerate([4, 0, 1, 7])
    ]
    rows = TokenizedRows.from_examples(made)
    assert rows.supervised_counts.tolist() == [int(e.loss_mask[1:].sum()) for e in made]
    for a, b in zip(made, rows, strict=True):
        assert (a.id, a.domain, a.digest) == (b.id, b.domain, b.digest)
        assert a.input_ids.tolist() == b.input_ids.tolist() and a.loss_mask.tolist() == b.loss_mask.tolist()


def test_the_examples_of_the_docstrings_hold() -> None:
    assert doctest.testmod(columns).failed == 0
