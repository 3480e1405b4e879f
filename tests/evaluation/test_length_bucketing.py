"""Each example falls into exactly one bucket, and the label says which lengths a bucket takes."""

from __future__ import annotations

import doctest
import re

import numpy as np
import pytest

from training_lens.errors import ConfigurationError
from training_lens.evaluation import comparison
from training_lens.evaluation.comparison import LengthBuckets

DRAW = np.random.default_rng(0)
SETS = [
    DRAW.integers(1, 2000, 300),
    DRAW.integers(1, 8, 300),  # many of the same length
    DRAW.geometric(0.01, 97),
    np.array([7] * 90 + [900] * 10),
    np.full(20, 64),
    np.array([1]),
    np.array([3, 3, 5]),
]


def sizes(buckets: LengthBuckets, lengths: np.ndarray) -> list[int]:
    return np.bincount(buckets.assign(lengths), minlength=len(buckets.labels)).tolist()


def takes(label: str, length: int) -> bool:
    """Whether a reader of the label would look for the length under it."""
    if label == "all":
        return True
    if label.startswith("over "):
        return length > int(label.removeprefix("over "))
    low, _, high = label.partition("-")
    return int(low) <= length <= int(high or low)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 500])
@pytest.mark.parametrize("lengths", SETS, ids=range(len(SETS)))
def test_quantile_buckets_part_the_examples(lengths: np.ndarray, count: int) -> None:
    buckets = LengthBuckets.from_quantiles(lengths, count)
    assigned, filled = buckets.assign(lengths), sizes(buckets, lengths)
    assert assigned.dtype == np.int64 and assigned.shape == lengths.shape
    assert sum(filled) == len(lengths) and min(filled) > 0
    assert len(filled) == len(buckets.labels) <= min(count, len(set(lengths.tolist())))
    in_order = np.argsort(lengths)
    assert (np.diff(assigned[in_order]) >= 0).all()
    assert (np.diff(assigned[in_order])[np.diff(lengths[in_order]) == 0] == 0).all()


@pytest.mark.parametrize("buckets", [LengthBuckets.from_limits([1, 7, 64]), LengthBuckets.from_quantiles(SETS[1], 3)])
def test_a_label_says_which_lengths_its_bucket_takes(buckets: LengthBuckets) -> None:
    for length in (1, 2, 3, 6, 7, 8, 63, 64, 65, 100_000):
        bucket = int(buckets.assign(np.array([length]))[0])
        assert [i for i, label in enumerate(buckets.labels) if takes(label, length)] == [bucket]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 99, 100])
def test_different_lengths_fill_quantile_buckets_alike(count: int) -> None:
    filled = sizes(LengthBuckets.from_quantiles(DRAW.permutation(np.arange(1, 101)), count), np.arange(1, 101))
    assert len(filled) == count and max(filled) - min(filled) <= 1


def test_a_cut_goes_where_it_leaves_the_sizes_nearest_to_equal() -> None:
    lengths = np.array([1, 2, 3, 4, 5, 5, 5, 5, 5, 5])
    assert sizes(LengthBuckets.from_quantiles(lengths, 2), lengths) == [4, 6]
    lengths = np.array([1, 1, 1, 1, 1, 1, 2, 3, 4, 5])
    assert sizes(LengthBuckets.from_quantiles(lengths, 2), lengths) == [6, 4]


def test_one_length_one_example_or_none_is_one_bucket() -> None:
    for lengths in ([64] * 20, [5], []):
        assert LengthBuckets.from_quantiles(np.array(lengths, dtype=np.int64), 4).labels == ("all",)


def test_limits_belong_to_the_bucket_below_and_a_bucket_may_be_empty() -> None:
    buckets = LengthBuckets.from_limits([1, 64, 128, 512])
    assert buckets.labels == ("1", "2-64", "65-128", "129-512", "over 512")
    assert sizes(buckets, np.array([1, 64, 128, 128, 10_000])) == [1, 1, 2, 0, 1]
    assert sizes(buckets, np.array([], dtype=np.int64)) == [0] * 5


@pytest.mark.parametrize("limits", [[], [0, 5], [-1], [5, 5], [64, 32], [1, 3, 2]])
def test_limits_that_are_none_are_refused(limits: list[int]) -> None:
    with pytest.raises(ConfigurationError, match=rf"evaluation\.length_buckets: {re.escape(str(limits))}"):
        LengthBuckets.from_limits(limits)


def test_the_examples_of_the_docstrings_hold() -> None:
    failed, tried = doctest.testmod(comparison)
    assert tried > 2 and not failed
