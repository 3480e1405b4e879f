"""What a benchmark says of its timed calls: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

METHOD = (
    "Percentiles are interpolated linearly between samples (numpy's default): latency and time to first token have one "
    "sample a repetition, time per token one for each decode step of each repetition. With few samples p95 and p99 lie "
    "close to the slowest one. Tokens per second are the new tokens of all rows over the latency. Peak memory is the "
    "device's (CUDA) or the process's (Linux) during the calls, with the weights of all measured models loaded: what "
    "differs between models is what their calls took."
)


@dataclass(frozen=True)
class Call:
    """One timed call of `generate`: seconds from its start to each new token of the batch, and to its end.

    `peak_bytes` is the most memory in use meanwhile; None where the system does not tell.
    """

    moments: tuple[float, ...]
    latency: float
    peak_bytes: int | None

    @property
    def first_token(self) -> float:
        """Seconds to the first new token: reading the prompt, and choosing one token for each row."""
        return self.moments[0]

    @property
    def steps(self) -> list[float]:
        """Seconds of each decode step, from one token to the next; a step gives every row its token."""
        return [later - earlier for earlier, later in zip(self.moments, self.moments[1:], strict=False)]


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of some samples, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Example:
        >>> Spread.of([1.0, 2.0, 3.0]).p50
        2.0
        """
        p50, p95, p99 = (float(value) for value in np.percentile(samples, (50, 95, 99)))
        return cls(float(np.mean(samples)), p50, p95, p99, len(samples))


@dataclass(frozen=True)
class Speed:
    """What the calls of one cell come to; `token` is one decode step, which gives every row of the batch a token."""

    first_token: Spread
    token: Spread
    latency: Spread
    tokens_per_second: float
    peak_bytes: int | None

    @classmethod
    def of(cls, calls: Sequence[Call], batch_size: int) -> Speed:
        """Of at least one call, each of at least two tokens."""
        new_tokens = sum(batch_size * len(call.moments) for call in calls)
        return cls(
            first_token=Spread.of([call.first_token for call in calls]),
            token=Spread.of([step for call in calls for step in call.steps]),
            latency=Spread.of([call.latency for call in calls]),
            tokens_per_second=new_tokens / sum(call.latency for call in calls),
            peak_bytes=max((call.peak_bytes for call in calls if call.peak_bytes is not None), default=None),
        )


@dataclass(frozen=True)
class Cell:
    """One model at one batch size and prompt length: its speed, or the reason why there is none."""

    model: str
    batch_size: int
    prompt_length: int
    speed: Speed | None
    reason: str | None
