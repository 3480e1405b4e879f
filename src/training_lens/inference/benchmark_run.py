"""How fast a run answers: base, adapter and merged model side by side, over batch sizes and prompt lengths.

Every call has prompts of one exact length and generates the same number of tokens for each, greedily and without stop
tokens, so that cells can be compared. Within a repetition the models take turns, so that a slow spell of the machine
slows them all.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from training_lens.config.evaluation_sections import BenchmarkSection
from training_lens.display.progress import Progress
from training_lens.errors import AdapterError, DatasetError
from training_lens.inference.benchmark_cells import METHOD, Cell, Speed, TimedCall
from training_lens.inference.heldout_examples import read_training_tokens
from training_lens.inference.session import Session
from training_lens.models.copies import copy_base, copy_merged
from training_lens.utils.devices import (
    device_name,
    peak_bytes,
    reset_peak,
    reset_process_peak,
    synchronize,
)
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
TEXT_TOKENS = 8192  # of the run's rows, at most; prompts are cut from them
PACKAGES = ("torch", "transformers", "peft")
Outcome = list[TimedCall] | str  # a model's calls, or why there are none


@dataclass(frozen=True)
class Benchmark:
    """All cells, and what they were measured on.

    `weights_bytes` are those of each model alone; `prompts` says what the prompts were cut from.
    """

    run: str
    machine: dict[str, Any]
    settings: BenchmarkSection
    prompts: str
    weights_bytes: dict[str, int]
    cells: list[Cell]

    def as_json(self) -> dict[str, Any]:
        """Plain values; times in seconds, sizes in bytes."""
        return {**asdict(self), "settings": self.settings.model_dump(), "method": METHOD}


def run_benchmark(session: Session, settings: BenchmarkSection, progress: Progress) -> Benchmark:
    """Measure every cell that fits; the session's model is not changed.

    Memory: the adapted layers' weights once more where `merged` is measured. A cell that does not fit the model's
    positions or the memory has a reason in place of numbers; the others are measured all the same.

    Args:
        session: of a run, with its adapter.
    """
    models, missing = _build_models(session, settings.models)
    text, prompts = _read_prompt_tokens(session, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    shapes = [(rows, length) for length in settings.prompt_lengths for rows in settings.batch_sizes]
    calls = len(models) * (settings.warmup + settings.repetitions)
    cells: list[Cell] = []
    with progress.task("measuring", len(shapes) * calls) as advance:
        for rows, length in shapes:
            ids = _cut_prompts(text, rows, length, generator)
            if reason := _explain_no_room(session, length, settings.new_tokens):
                outcomes: dict[str, Outcome] = dict.fromkeys(models, reason)
                advance(calls)
            else:
                outcomes = _time_models(models, ids.to(session.device), settings, session.pad_id, advance)
            outcomes |= missing
            cells += [_make_cell(name, rows, length, outcomes[name]) for name in settings.models]
    sizes = {name: _weights_bytes(model) for name, model in models.items()}
    return Benchmark(session.source, _describe_machine(session), settings, prompts, sizes, cells)


def _build_models(session: Session, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """The models by name, and for those that cannot be built the reason."""
    make = {"base": copy_base, "adapter": lambda model: model, "merged": copy_merged}
    models: dict[str, Any] = {}
    missing: dict[str, Outcome] = {}
    for name in names:
        try:
            models[name] = make[name](session.model)
        except Exception as error:
            if not isinstance(error, AdapterError) and not is_out_of_memory(error):
                raise
            missing[name] = _describe_failure(error)
    return models, missing


def _describe_failure(error: Exception) -> str:
    return f"out of memory: {describe_error(error)}" if is_out_of_memory(error) else describe_error(error)


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


def _cut_prompts(text: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random stretches of the text, (rows, length); a text that is too short is repeated."""
    starts = torch.randint(len(text), (rows, 1), generator=generator)
    return text[(starts + torch.arange(length)) % len(text)]


def _explain_no_room(session: Session, length: int, new_tokens: int) -> str | None:
    """Why prompts of this length and their answers do not fit the model; None if they do."""
    if session.positions is None or length + new_tokens <= session.positions:
        return None
    return f"{length} + {new_tokens} tokens do not fit the model's {session.positions} positions"


def _time_models(
    models: Mapping[str, Any],
    ids: torch.Tensor,
    settings: BenchmarkSection,
    pad_id: int,
    advance: Callable[[float], None],
) -> dict[str, Outcome]:
    """The timed calls of each model on these prompts, in turns; a reason for a model that runs out of memory."""
    calls: dict[str, list[TimedCall]] = {name: [] for name in models}
    failed: dict[str, Outcome] = {}
    for repetition in range(-settings.warmup, settings.repetitions):
        for name, model in models.items():
            advance(1)
            if name in failed:
                continue
            try:
                call = _time_call(model, ids, settings.new_tokens, pad_id)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed[name] = _describe_failure(error)
                continue
            if repetition >= 0:
                calls[name].append(call)
    return {**calls, **failed}


def _time_call(model: Any, ids: torch.Tensor, new_tokens: int, pad_id: int) -> TimedCall:
    """One timed call of `generate`. The device is synchronized after each token."""
    from transformers import StoppingCriteriaList

    device, times = ids.device, list[float]()

    def record_time(rows: torch.Tensor, _scores: Any, **_options: Any) -> torch.Tensor:
        synchronize(device)
        times.append(time.perf_counter() - start)
        return torch.zeros(len(rows), dtype=torch.bool, device=device)

    counted = _restart_peak(device)
    synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=pad_id,
            stopping_criteria=StoppingCriteriaList([record_time]),
        )
    synchronize(device)
    latency = time.perf_counter() - start
    return TimedCall(tuple(times), latency, peak_bytes(device) if counted else None)


def _restart_peak(device: torch.device) -> bool:
    """Restart the count of peak memory; False where the system cannot."""
    if device.type != "cuda":
        return reset_process_peak()
    reset_peak(device)
    return True


def _make_cell(name: str, rows: int, length: int, outcome: Outcome) -> Cell:
    if isinstance(outcome, str):
        return Cell(name, rows, length, None, outcome)
    return Cell(name, rows, length, Speed.from_calls(outcome, rows), None)


def _weights_bytes(model: Any) -> int:
    """Bytes of the model's parameters and buffers, tied ones once."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


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
