"""Statistics of lengths and domains of a split, and a histogram for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from training_lens.data.token_dataset import TokenDataset

QUANTILES = (0.05, 0.5, 0.95, 0.99)
EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class LengthStatistics:
    """Tokens of examples: the mean, the ends, and at each of `QUANTILES` the smallest length that so large a share is
    not above."""

    examples: int
    tokens: int
    mean: float
    shortest: int
    longest: int
    quantiles: dict[str, int]


def compute_length_statistics(lengths: np.ndarray) -> LengthStatistics:
    """The statistics of one or more lengths in tokens, (examples,)."""
    at = np.quantile(lengths, QUANTILES, method="inverted_cdf")
    return LengthStatistics(
        examples=len(lengths),
        tokens=int(lengths.sum()),
        mean=float(lengths.mean()),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        quantiles={f"{share:g}": int(value) for share, value in zip(QUANTILES, at, strict=True)},
    )


@dataclass(frozen=True)
class DomainStatistics:
    """Examples and tokens of one domain; `supervised_tokens` have a loss."""

    examples: int
    tokens: int
    supervised_tokens: int


def compute_domain_statistics(dataset: TokenDataset) -> dict[str, DomainStatistics]:
    """Statistics by domain, sorted by name, without examples that have no domain."""
    have = np.array([name is not None for name in dataset.domains], dtype=bool)
    names, index = np.unique(dataset.domains[have].astype(str), return_inverse=True)
    tokens = (dataset.lengths[have], dataset.supervised_counts[have])
    sums = (np.bincount(index, values).astype(np.int64) for values in tokens)
    columns = (np.bincount(index), *sums)  # a sum of float64 is exact below 2^53 tokens
    return {
        str(name): DomainStatistics(*each)
        for name, *each in zip(names, *(column.tolist() for column in columns), strict=True)
    }


def draw_histogram(lengths: np.ndarray, bins: int = 10, width: int = 78) -> list[str]:
    """One line per bin: limits, bar, number of examples. No line is wider than `width`.

    Bins have one round width (1, 2 or 5 times a power of ten); the last one includes everything above the 99 %
    quantile.

    Example:
        >>> print(*draw_histogram(np.array([1, 2, 11, 12, 13, 14]), bins=2, width=30), sep="\\n")
         0 -  9 │ █████████          2
        10 - 19 │ ██████████████████ 4
    """
    ordinary = int(np.quantile(lengths, 0.99, method="inverted_cdf"))
    steps = (factor * int(10**power) for power in count() for factor in (1, 2, 5))
    step = next(step for step in steps if step > (ordinary - int(lengths.min())) / bins)
    first, last = int(lengths.min()) // step, ordinary // step
    counts = np.bincount(np.minimum(lengths // step, last) - first, minlength=last - first + 1)
    digits = len(str((last + 1) * step - 1))
    labels = [f"{b * step:>{digits}} - {(b + 1) * step - 1:>{digits}}" for b in range(first, last + 1)]
    if lengths.max() >= (last + 1) * step:
        labels[-1] = f"{last * step:>{digits}} {'on':<{digits + 2}}"
    return _draw_bars(labels, counts.tolist(), width)


def _draw_bars(labels: Sequence[str], counts: Sequence[int], width: int) -> list[str]:
    figures = [f"{count:,}" for count in counts]
    room = width - len(labels[0]) - len(" │  ") - max(map(len, figures))
    lines = []
    for label, number, figure in zip(labels, counts, figures, strict=True):
        whole, eighths = divmod(round(8 * room * number / max(counts)), 8)
        bar = (EIGHTHS[-1] * whole + EIGHTHS[eighths]).rstrip()
        lines.append(f"{label} │ {bar:<{room}} {figure:>{max(map(len, figures))}}")
    return lines
