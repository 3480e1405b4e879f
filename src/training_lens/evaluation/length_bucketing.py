"""Buckets of examples by length in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from training_lens.errors import ConfigurationError


@dataclass(frozen=True)
class LengthBuckets:
    """Consecutive ranges of lengths in tokens, from 1 up: each example falls into exactly one.

    `limits` are the longest length of each range, ascending. One more bucket takes what is longer than the last limit,
    so every length has a bucket; without limits, there is one bucket for all.

    Example:
        >>> buckets = LengthBuckets.from_limits([64, 128])
        >>> buckets.labels, buckets.assign(np.array([1, 64, 65, 900])).tolist()
        (('1-64', '65-128', 'over 128'), [0, 0, 1, 2])
    """

    limits: tuple[int, ...]

    @classmethod
    def from_quantiles(cls, lengths: np.ndarray, count: int) -> LengthBuckets:
        """At most `count` buckets of nearly equal size; none is empty.

        The limits are the lengths nearest to i/count of the examples, i = 1 .. count - 1. Equal lengths share a bucket,
        so there may be fewer buckets. The last bucket has no upper limit.

        Args:
            lengths: (examples,) tokens, integers from 1.
            count: 1 or more.

        Example:
            >>> LengthBuckets.from_quantiles(np.array([5, 6, 7, 8, 20, 90]), 3).labels
            ('1-6', '7-8', 'over 8')
        """
        values, examples = np.unique(lengths, return_counts=True)
        cuts = np.cumsum(examples)[:-1]  # examples up to each length; none are longer than the longest
        if not len(cuts):
            return cls(())
        ideal = len(lengths) * np.arange(1, count) / count
        nearest = np.abs(cuts[:, None] - ideal).argmin(axis=0)  # (lengths, count - 1) -> (count - 1,)
        return cls(tuple(np.unique(values[nearest]).tolist()))

    @classmethod
    def from_limits(cls, limits: Sequence[int]) -> LengthBuckets:
        """Buckets up to the given lengths in tokens, inclusive, and one for what is longer.

        Raises:
            ConfigurationError: the limits are empty, not all positive, or not ascending.
        """
        if not limits or limits[0] < 1 or any(after <= before for before, after in pairwise(limits)):
            raise ConfigurationError(
                f"evaluation.length_buckets: {list(limits)} are no bucket limits; give lengths in tokens from 1 "
                "up, each greater than the one before, such as [64,128,512]."
            )
        return cls(tuple(limits))

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each bucket: '65-128', '7' for a single length, 'over 128' for the last."""
        if not self.limits:
            return ("all",)
        ranges = [(before + 1, limit) for before, limit in pairwise((0, *self.limits))]
        closed = [f"{low}-{high}" if low < high else f"{high}" for low, high in ranges]
        return (*closed, f"over {self.limits[-1]}")

    def assign(self, lengths: np.ndarray) -> np.ndarray:
        """The bucket of each example, an index into `labels`: (examples,) int64."""
        return np.searchsorted(np.array(self.limits, dtype=np.int64), lengths, side="left").astype(np.int64)
