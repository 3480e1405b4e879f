"""How fast a run answers: base, adapter and merged model side by side, over batch sizes and prompt lengths.

The calls are those of `infer`: the decode loop, or the model's own `generate` where that answers. Every call has
prompts of one exact length and generates the same number of tokens for each, greedily and without stop tokens, so that
cells can be compared. Within a repetition the models take turns, so that a slow spell of the machine slows them all.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np
import torch

from training_lens.config.evaluation_sections import BenchmarkSection
from training_lens.display.progress import Progress
from training_lens.errors import AdapterError, DatasetError
from training_lens.inference.generator import prepare_batch
from training_lens.inference.heldout_examples import read_training_tokens
from training_lens.inference.session import Session
from training_lens.models.copies import copy_base, copy_merged
from training_lens.utils.devices import device_name, peak_bytes, reset_peak, reset_process_peak, synchronize
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
TEXT_TOKENS = 8192  # of the run's rows, at most; prompts are cut from them
PACKAGES = ("torch", "transformers", "peft")
METHOD = (
    "Percentiles are interpolated linearly between samples (numpy's default): latency and time to first token have one "
    "sample a repetition, time per token one for each decode step of each repetition. With few samples p95 and p99 lie "
    "close to the slowest one. Tokens per second are the new tokens of all rows over the latency. Peak memory is the "
    "device's (CUDA) or the process's (Linux) during the calls, with the weights of all measured models loaded: what "
    "differs between models is what their calls took."
)


@dataclass(frozen=True)
class TimedCall:
    """One timed batch: seconds from its start until every row has its first, second, ... new token, and to its end."""

    token_times: tuple[float, ...]
    latency: float
    peak_bytes: int | None  # the most memory in use; None where the system does not report it


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of samples, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float
    samples: int

    @classmethod
    def from_samples(cls, samples: Sequence[float] | np.ndarray) -> Spread:
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
            first_token=Spread.from_samples([call.token_times[0] for call in calls]),  # the prefill, and sampling once
            token=Spread.from_samples(np.concatenate([np.diff(call.token_times) for call in calls])),
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


Outcome = list[TimedCall] | str  # a model's calls, or why there are none


@dataclass(frozen=True)
class Benchmark:
    """All cells, and what they were measured on."""

    run: str
    machine: dict[str, Any]
    settings: BenchmarkSection
    prompts: str  # what they were cut from
    weights_bytes: dict[str, int]  # of each model alone
    cells: list[Cell]

    def as_json(self) -> dict[str, Any]:
        """Plain values; times in seconds, sizes in bytes."""
        return {**asdict(self), "settings": self.settings.model_dump(), "method": METHOD}


def run_benchmark(session: Session, settings: BenchmarkSection, progress: Progress) -> Benchmark:
    """Measure every cell that fits, for a run's session with its adapter; its model is not changed.

    Memory: the adapted layers' weights once more where `merged` is measured, and what each decoder copies. A cell that
    does not fit the model's positions or the memory has a reason in place of numbers; the others are measured all the
    same.
    """
    sessions, missing = _build_sessions(session, settings.models)
    text, prompts = _read_prompt_tokens(session, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    shapes = [(rows, length) for length in settings.prompt_lengths for rows in settings.batch_sizes]
    calls = len(sessions) * (settings.warmup + settings.repetitions)
    cells: list[Cell] = []
    with progress.task("measuring", len(shapes) * calls) as advance:
        for rows, length in shapes:
            starts = torch.randint(len(text), (rows, 1), generator=generator)
            ids = text[(starts + torch.arange(length)) % len(text)]  # (rows, length); a short text is repeated
            if session.positions is not None and length + settings.new_tokens > session.positions:
                misfit = f"{length} + {settings.new_tokens} tokens do not fit the model's {session.positions} positions"
                outcomes: dict[str, Outcome] = dict.fromkeys(sessions, misfit)
                advance(calls)
            else:
                outcomes = _time_sessions(sessions, ids.tolist(), settings, advance)
            outcomes |= missing
            for name in settings.models:
                found = outcomes[name]
                speed, reason = (None, found) if isinstance(found, str) else (Speed.from_calls(found, rows), None)
                cells.append(Cell(name, rows, length, speed, reason))
    models = {name: each.model for name, each in sessions.items()}
    weights = {name: [*model.parameters(), *model.buffers()] for name, model in models.items()}  # tied ones once
    sizes = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in weights.items()}
    return Benchmark(session.source, _describe_machine(session), settings, prompts, sizes, cells)


def _build_sessions(session: Session, names: Sequence[str]) -> tuple[dict[str, Session], dict[str, Outcome]]:
    """Sessions of the models by name, whose answers no token ends; and for models that cannot be built the reason."""
    make = {"base": copy_base, "adapter": lambda model: model, "merged": copy_merged}
    sessions: dict[str, Session] = {}
    missing: dict[str, Outcome] = {}
    for name in names:
        try:
            sessions[name] = replace(session, model=make[name](session.model), stop_ids=frozenset())
        except AdapterError as error:
            missing[name] = describe_error(error)
        except Exception as error:
            missing[name] = _describe_lack_of_memory(error)
    return sessions, missing


def _describe_lack_of_memory(error: Exception) -> str:
    """The reason; raises again what is none."""
    if not is_out_of_memory(error):
        raise error
    return f"out of memory: {describe_error(error)}"


def _read_prompt_tokens(session: Session, seed: int) -> tuple[torch.Tensor, str]:
    """Tokens to cut prompts from, (tokens,) int64, and what they are: the run's rows, or random tokens without them."""
    try:
        tokens = read_training_tokens(session, TEXT_TOKENS)
    except DatasetError as error:
        logger.warning("the run's rows cannot be read, so the prompts are random tokens: %s", error)
        generator = torch.Generator().manual_seed(seed)
        vocabulary = session.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (TEXT_TOKENS,), generator=generator), f"random tokens ({error})"
    return torch.tensor(tokens), "the run's training rows"


def _time_sessions(
    sessions: Mapping[str, Session],
    prompts: Sequence[Sequence[int]],
    settings: BenchmarkSection,
    advance: Callable[[float], None],
) -> dict[str, Outcome]:
    """The timed calls of each model on these prompts, in turns; a reason for a model that runs out of memory."""
    calls: dict[str, list[TimedCall]] = {name: [] for name in sessions}
    failed: dict[str, Outcome] = {}
    for repetition in range(-settings.warmup, settings.repetitions):
        for name, session in sessions.items():
            advance(1)
            if name in failed:
                continue
            try:
                call = _time_call(session, prompts, settings.new_tokens)
            except Exception as error:
                failed[name] = _describe_lack_of_memory(error)
                continue
            if repetition >= 0:
                calls[name].append(call)
    return {**calls, **failed}


def _time_call(session: Session, prompts: Sequence[Sequence[int]], new_tokens: int) -> TimedCall:
    """One timed batch. Each step ends with its tokens on the CPU, so the device has computed them."""
    moments: list[float] = []  # of each token of each row
    generate = prepare_batch(session, prompts, new_tokens, lambda _token: moments.append(time.perf_counter()))
    reset_peak(session.device)
    counted = session.device.type == "cuda" or reset_process_peak()  # false where the system cannot restart the count
    synchronize(session.device)
    start = time.perf_counter()
    generate()
    latency = time.perf_counter() - start
    steps = tuple(moment - start for moment in moments[len(prompts) - 1 :: len(prompts)])
    return TimedCall(steps, latency, peak_bytes(session.device) if counted else None)


def _describe_machine(session: Session) -> dict[str, Any]:
    """The device, the software and the number types of the measurement."""
    return {
        "device": str(session.device),
        "device_name": device_name(session.device),
        "threads": torch.get_num_threads(),
        "weights": str(session.model.dtype).removeprefix("torch."),
        "quantization": session.config.model.quantization,
        "attention": session.model.config._attn_implementation,
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }
