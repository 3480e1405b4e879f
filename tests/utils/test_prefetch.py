"""Prefetched items come in order, once, and an error comes at its place."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from training_lens.utils.prefetch import prefetch


def test_all_items_come_in_their_order_also_those_that_are_nothing() -> None:
    assert list(prefetch(iter([0, None, "", [], 4]))) == [0, None, "", [], 4]
    assert list(prefetch(iter([]))) == []


def test_the_next_item_is_made_while_the_last_one_is_in_use() -> None:
    made = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        made.set()
        yield 2

    coming = prefetch(items())
    assert next(coming) == 1
    assert made.wait(timeout=30)
    assert list(coming) == [2]


def test_an_error_comes_behind_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    coming = prefetch(items())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="the second"):
        next(coming)


def test_who_leaves_early_stops_the_work() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    coming = prefetch(items())
    next(coming)
    coming.close()  # type: ignore[attr-defined]
    assert len(made) <= 2
