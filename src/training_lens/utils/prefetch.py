"""Prefetching: the next item is made in a thread while the current one is in use."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """The items in order; a thread makes the next one while the current one is in use.

    An error in making an item is raised where the item would have come. At most two items are held.

    Example:
        >>> list(prefetch(iter("abc")))
        ['a', 'b', 'c']
    """
    with ThreadPoolExecutor(1, "prefetch") as thread:
        coming = thread.submit(_take_next, items)
        while taken := coming.result():
            coming = thread.submit(_take_next, items)
            yield taken[0]


def _take_next(items: Iterator[Item]) -> list[Item]:
    """The next item alone, or nothing at the end."""
    return list(islice(items, 1))
