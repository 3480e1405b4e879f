"""Lengths and domains as numbers, and a histogram that loses no example and fits the terminal."""

from __future__ import annotations

import doctest
import re
import time

import numpy as np
import pytest

from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.preparation import deduplication, selection, statistics
from training_lens.preparation.statistics import (
    DomainStatistics,
    compute_domain_statistics,
    compute_length_statistics,
    draw_histogram,
)


def test_quantiles_are_lengths_that_so_many_are_not_above() -> None:
    found = compute_length_statistics(np.arange(1, 201))
    assert (found.examples, found.tokens, found.mean) == (200, 20100, 100.5)
    assert (found.shortest, found.longest) == (1, 200)
    assert found.quantiles == {"0.05": 10, "0.5": 100, "0.95": 190, "0.99": 198}


def test_domains_add_up_to_their_examples() -> None:
    rows = [("b", 4), ("a", 3), (None, 9), ("b", 5)]
    examples = [
        TokenizedExample("f", i, np.arange(n, dtype=np.int32), np.arange(n) > 1, domain)
        for i, (domain, n) in enumerate(rows)
    ]
    found = compute_domain_statistics(TokenDataset.from_examples(examples))
    assert found == {"a": DomainStatistics(1, 3, 1), "b": DomainStatistics(2, 9, 2 + 3)}


def test_examples_without_a_domain_are_in_none() -> None:
    example = TokenizedExample("f", 1, np.arange(3, dtype=np.int32), np.arange(3) > 1, None)
    assert compute_domain_statistics(TokenDataset.from_examples([example])) == {}


def test_many_domains_cost_no_pass_over_the_rows_each() -> None:
    """Ten thousand domains in as many rows: a comparison for each with each took seconds."""
    ids, mask = np.arange(2, dtype=np.int32), np.array([False, True])
    dataset = TokenDataset.from_examples([TokenizedExample("f", i, ids, mask, f"d{i}") for i in range(10_000)])
    started = time.process_time()
    found = compute_domain_statistics(dataset)
    assert len(found) == 10_000 and found["d7"] == DomainStatistics(1, 2, 1)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "lengths",
    [[7], [5] * 9, [1, 2048], range(1, 1000), [*range(100, 400), 100_000], [512] * 50 + [30]],
    ids=["one", "equal", "ends", "even", "outlier", "cut"],
)
def test_the_histogram_counts_every_example_in_eighty_columns(lengths: list[int]) -> None:
    lines = draw_histogram(np.array(lengths))
    assert all(len(line) <= 78 for line in lines) and len({len(line) for line in lines}) == 1
    assert sum(int(re.findall(r"[\d,]+$", line)[0].replace(",", "")) for line in lines) == len(lengths)
    assert len(lines) <= 12


def test_bars_are_as_long_as_their_counts() -> None:
    lines = draw_histogram(np.array([1] * 40 + [11] * 20 + [21] * 10), bins=3)
    bars = [line.count("█") for line in lines]
    assert len(bars) == 3 and abs(bars[0] - 2 * bars[1]) <= 1 and abs(bars[1] - 2 * bars[2]) <= 1


def test_a_long_tail_is_one_open_line() -> None:
    assert " on " in draw_histogram(np.array([*range(100, 400), 100_000]))[-1]


@pytest.mark.parametrize("module", [deduplication, selection, statistics])
def test_examples_in_the_docstrings_hold(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted and not result.failed
