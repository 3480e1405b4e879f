"""The figures of a benchmark from its timed calls: pure functions of numbers."""

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
class TimedCall:
    """One timed call of `generate`: seconds from its start to each new token of the batch, and to its end.

    `peak_bytes` is the most memory in use during the call; None where the system does not report it.
    """

    token_times: tuple[float, ...]
    latency: float
    peak_bytes: int | None

    @property
    def first_token(self) -> float:
        """Seconds to the first new token: the prefill, and sampling one token for each row."""
        return self.token_times[0]

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of each decoding step, from one token to the next; a step gives every row a token."""
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of samples, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float
    samples: int

    @classmethod
    def from_samples(cls, samples: Sequence[float]) -> Spread:
        """Example:
        >>> Spread.from_samples([1.0, 2.0, 3.0]).p50
        2.0
        """
        p50, p95, p99 = (float(value) for value in np.percentile(samples, (50, 95, 99)))
        return cls(float(np.mean(samples)), p50, p95, p99, len(samples))


@dataclass(frozen=True)
class Speed:
    """The speed of one cell; `token` is one decoding step, which gives every row of the batch a token."""

    first_token: Spread
    token: Spread
    latency: Spread
    tokens_per_second: float
    peak_bytes: int | None

    @classmethod
    def from_calls(cls, calls: Sequence[TimedCall], batch_size: int) -> Speed:
        """From at least one call, each of at least two tokens."""
        new_tokens = sum(batch_size * len(call.token_times) for call in calls)
        return cls(
            first_token=Spread.from_samples([call.first_token for call in calls]),
            token=Spread.from_samples([step for call in calls for step in call.step_seconds]),
            latency=Spread.from_samples([call.latency for call in calls]),
            tokens_per_second=new_tokens / sum(call.latency for call in calls),
            peak_bytes=max((call.peak_bytes for call in calls if call.peak_bytes is not None), default=None),
        )


@dataclass(frozen=True)
class Cell:
    """One model at one batch size and prompt length: its speed, or the reason why it was not measured."""

    model: str
    batch_size: int
    prompt_length: int
    speed: Speed | None
    reason: str | None
