"""Work done ahead of its need, so that two things that do not hold each other up go on at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items in their order, of which the next one is made in a thread while the last one is in use.

    What making an item raises is raised where the item would have come. At most two items are held.

    Example:
        >>> list(ahead(iter("abc")))
        ['a', 'b', 'c']
    """
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(_next, items)
        while taken := coming.result():
            coming = thread.submit(_next, items)
            yield taken[0]


def _next(items: Iterator[Item]) -> list[Item]:
    """The next item alone, or nothing at the end."""
    return list(islice(items, 1))
