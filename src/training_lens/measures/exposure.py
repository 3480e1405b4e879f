"""What a model remembers of single rows: the exposure of a canary, and how far greedy decoding repeats a row."""

from __future__ import annotations

import math

import numpy as np


def measure_exposure(own: float, others: np.ndarray) -> float:
    """The exposure of a canary in bits, from its loss and those of the other candidates, (candidates,).

    Formula: log2 |R| - log2 rank, the canary among the |R| candidates and rank 1 the lowest loss (arXiv 1802.08232).
    Candidates with the very same loss share the mean of their ranks. At most log2 |R|.

    Example:
        >>> measure_exposure(0.5, np.array([1.0, 2.0, 3.0]))
        2.0
    """
    rank = 1 + float((others < own).sum()) + float((others == own).sum()) / 2
    return math.log2(len(others) + 1) - math.log2(rank)


def expected_exposure(candidates: int) -> float:
    """The mean exposure in bits of a canary that was never seen, whose rank is any of `candidates` with equal chance.

    Formula: log2 n - log2(n!) / n, which grows to log2 e = 1.443 bits.
    """
    return math.log2(candidates) - math.lgamma(candidates + 1) / math.log(2) / candidates


def exposure_deviation(candidates: int) -> float:
    """The standard deviation in bits of the exposure of one canary that was never seen; near log2 e."""
    bits = math.log2(candidates) - np.log2(np.arange(1, candidates + 1))
    return float(bits.std())


def chance_of_exposure(mean: float, canaries: int) -> float:
    """How likely so many canaries that were never seen reach this mean exposure in bits, at most.

    Formula: the exposure of one is at most -log2 of a uniform variable, so the tail of their sum is at most Erlang's,
    e^-s sum over k < n of s^k / k!, with s = n mean ln 2. For one canary it is exact at every rank: rank / |R|.

    Example:
        >>> chance_of_exposure(5.0, 1) == 2**-5
        True
    """
    total = canaries * mean * math.log(2)
    if total <= 0:
        return 1.0
    return math.fsum(math.exp(k * math.log(total) - math.lgamma(k + 1) - total) for k in range(canaries))


def count_leading(correct: np.ndarray) -> int:
    """How many tokens of a row greedy decoding repeats before its first other one.

    `correct` (targets,) bool says of each whether the model ranks it first given the true tokens before it. Up to the
    first mismatch these are the tokens that greedy decoding itself wrote, so no generation is needed.
    """
    return len(correct) if correct.all() else int(correct.argmin())


def find_longest_run(correct: np.ndarray) -> tuple[int, int]:
    """The longest continuation that greedy decoding gives from some prefix of a row: its length, and where it begins.

    `correct` is that of `count_leading`; of equally long ones, the first.

    Example:
        >>> find_longest_run(np.array([True, False, True, True, False]))
        (2, 2)
    """
    breaks = np.flatnonzero(np.concatenate([[True], ~correct, [True]]))
    lengths = np.diff(breaks) - 1
    return int(lengths.max()), int(breaks[lengths.argmax()])
