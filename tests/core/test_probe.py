"""A probe set holds real tokens only, and evaluation leaves the model as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from training_lens.core.probe import Probe
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import LensError


def test_padding_on_either_side_moves_to_the_right() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, -100, 6], [-100, 8, 9, -100]]),
    }
    probe = Probe.from_batch(batch)
    assert probe.input_ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert probe.loss_mask.tolist() == [[False, True, False], [False, True, True]]
    assert probe.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert probe.token_counts() == {"examples": 2, "tokens": 5, "supervised_tokens": 3}


def test_rows_without_labels_are_fully_supervised() -> None:
    probe = Probe.from_batch([{"input_ids": [3, 4]}, {"input_ids": [5, 6, 7]}])
    assert torch.equal(probe.loss_mask, probe.attention_mask) and probe.lengths.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([{"text": "a"}], "has no input_ids, but text"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids, but 1 labels"),
        ([{"input_ids": [1]}], "no example of two tokens"),
        ([], "no example of two tokens"),
        ({}, "no example of two tokens"),
    ],
)
def test_an_unusable_batch_is_refused(batch: Any, said: str) -> None:
    with pytest.raises(LensError, match=said):
        Probe.from_batch(batch)


def dataset(*lengths: int) -> TokenDataset:
    examples = [
        TokenizedExample("rows.jsonl", i, np.arange(1, n + 1, dtype=np.int32), np.arange(n) > 0, None)
        for i, n in enumerate(lengths)
    ]
    return TokenDataset.from_examples(examples)


@pytest.mark.parametrize(
    ("lengths", "tokens", "wanted"),
    [
        ((4, 5, 9), 100, [4, 5, 9]),  # all of a small set
        ((400, *range(5, 14), 300), 80, [5, 6, 7, 8, 9, 10, 11, 12]),  # eight that fit, whatever comes first
        ((90, 80, 70, 60, 50, 40, 30, 20, 10), 80, [10] * 8),  # cut, as eight whole ones do not fit
        ((9,), 4, [4]),
    ],
)
def test_a_probe_set_has_eight_examples_that_fit(lengths: tuple[int, ...], tokens: int, wanted: list[int]) -> None:
    probe = Probe.from_dataset(dataset(*lengths), tokens, fill_id=0)
    assert probe is not None and sorted(probe.lengths.tolist()) == wanted
    assert probe.input_ids.shape == probe.loss_mask.shape == (len(wanted), max(wanted))
    assert probe.token_counts()["supervised_tokens"] == sum(wanted) - len(wanted)


def test_of_many_short_examples_those_taken_are_spread_and_always_the_same() -> None:
    many = dataset(*[8] * 500, *[4] * 500)
    first, again = (Probe.from_dataset(many, 256, fill_id=0) for _ in range(2))
    assert first is not None and again is not None and torch.equal(first.lengths, again.lengths)
    assert 200 < int(first.lengths.sum()) <= 256 and {4, 8} == set(first.lengths.tolist())


def test_a_cut_keeps_what_is_supervised() -> None:
    long = TokenizedExample("rows.jsonl", 0, np.arange(200, dtype=np.int32), np.arange(200) >= 190, None)
    probe = Probe.from_dataset(TokenDataset.from_examples([long]), 32, fill_id=0)
    assert probe is not None and probe.token_counts()["supervised_tokens"] == 10
    assert probe.input_ids[0, 0] == 174 and probe.lengths.tolist() == [26]


def test_zero_tokens_give_no_probe() -> None:
    assert Probe.from_dataset(dataset(4), 0, fill_id=0) is None
