"""How fast a run answers: base, adapter and merged model side by side, over batch sizes and prompt lengths.

Every call reads prompts of exactly so many tokens and generates exactly so many for each, greedily, end tokens or not,
so that one cell can be held against another. Within a repetition the models take turns: what slows the machine down
for a while slows them all.
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
from training_lens.inference.benchmark_cells import METHOD, Call, Cell, Speed
from training_lens.inference.prompt_rows import training_tokens
from training_lens.inference.session import Session
from training_lens.models.copies import base_copy, merged_copy
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
TEXT_TOKENS = 8192  # of the run's rows, at most: prompts are cut out of them
PACKAGES = ("torch", "transformers", "peft")
Outcome = list[Call] | str  # a model's calls, or the reason why there are none


@dataclass(frozen=True)
class Benchmark:
    """All cells, and what they were measured with.

    `weights_bytes` are those of each model by itself; `prompts` says what the prompts were cut from.
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


def benchmark(session: Session, settings: BenchmarkSection, progress: Progress) -> Benchmark:
    """Measure every cell that fits; the session's model is afterwards what it was before.

    Costs the memory of the adapted layers' weights once more where `merged` is measured. A cell that the model's
    positions or the memory cannot hold has its reason in place of numbers, and the others are measured all the same.

    Args:
        session: of a run, with its adapter.
    """
    models, missing = _models(session, settings.models)
    text, prompts = _text(session, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    shapes = [(rows, length) for length in settings.prompt_lengths for rows in settings.batch_sizes]
    calls = len(models) * (settings.warmup + settings.repetitions)
    cells: list[Cell] = []
    with progress.task("measuring", len(shapes) * calls) as advance:
        for rows, length in shapes:
            ids = _prompts(text, rows, length, generator)
            if reason := _no_room(session, length, settings.new_tokens):
                outcomes: dict[str, Outcome] = dict.fromkeys(models, reason)
                advance(calls)
            else:
                outcomes = _side_by_side(models, ids.to(session.device), settings, session.pad_id, advance)
            outcomes |= missing
            cells += [_cell(name, rows, length, outcomes[name]) for name in settings.models]
    sizes = {name: _weights_bytes(model) for name, model in models.items()}
    return Benchmark(session.source, _machine(session), settings, prompts, sizes, cells)


def _models(session: Session, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """The models by their names, and of those that cannot be had the reason."""
    make = {"base": base_copy, "adapter": lambda model: model, "merged": merged_copy}
    models: dict[str, Any] = {}
    missing: dict[str, Outcome] = {}
    for name in names:
        try:
            models[name] = make[name](session.model)
        except Exception as error:
            if not isinstance(error, AdapterError) and not is_out_of_memory(error):
                raise
            missing[name] = _reason(error)
    return models, missing


def _reason(error: Exception) -> str:
    return f"out of memory: {describe_error(error)}" if is_out_of_memory(error) else describe_error(error)


def _text(session: Session, seed: int) -> tuple[torch.Tensor, str]:
    """Tokens to cut prompts from, (tokens,) int64, and what they are: the run's rows, or random where none are left."""
    try:
        tokens = training_tokens(session, TEXT_TOKENS)
    except DatasetError as error:
        logger.warning("the run's rows cannot be read, so the prompts are random tokens: %s", error)
        generator = torch.Generator().manual_seed(seed)
        vocabulary = session.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (TEXT_TOKENS,), generator=generator), f"random tokens ({error})"
    return torch.tensor(tokens), "the run's training rows"


def _prompts(text: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Stretches of the text that begin anywhere, (rows, length); a text that is too short is gone through again."""
    starts = torch.randint(len(text), (rows, 1), generator=generator)
    return text[(starts + torch.arange(length)) % len(text)]


def _no_room(session: Session, length: int, new_tokens: int) -> str | None:
    """Why prompts of this length and their answers do not fit the model; None where they do."""
    if session.positions is None or length + new_tokens <= session.positions:
        return None
    return f"{length} + {new_tokens} tokens do not fit the model's {session.positions} positions"


def _side_by_side(
    models: Mapping[str, Any],
    ids: torch.Tensor,
    settings: BenchmarkSection,
    pad_id: int,
    advance: Callable[[float], None],
) -> dict[str, Outcome]:
    """The calls of each model on these prompts, taken in turn; of one that runs out of memory, that reason."""
    calls: dict[str, list[Call]] = {name: [] for name in models}
    failed: dict[str, Outcome] = {}
    for repetition in range(-settings.warmup, settings.repetitions):
        for name, model in models.items():
            advance(1)
            if name in failed:
                continue
            try:
                call = _timed(model, ids, settings.new_tokens, pad_id)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed[name] = _reason(error)
                continue
            if repetition >= 0:
                calls[name].append(call)
    return {**calls, **failed}


def _timed(model: Any, ids: torch.Tensor, new_tokens: int, pad_id: int) -> Call:
    """One call of `generate` by the clock, which is read once the device has each token: one wait for it a token."""
    from transformers import StoppingCriteriaList

    device, moments = ids.device, list[float]()

    def note_the_time(rows: torch.Tensor, _scores: Any, **_options: Any) -> torch.Tensor:
        synchronize(device)
        moments.append(time.perf_counter() - start)
        return torch.zeros(len(rows), dtype=torch.bool, device=device)

    counted = _forget_peak(device)
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
            stopping_criteria=StoppingCriteriaList([note_the_time]),
        )
    synchronize(device)
    latency = time.perf_counter() - start
    return Call(tuple(moments), latency, peak_bytes(device) if counted else None)


def _forget_peak(device: torch.device) -> bool:
    """Count the peak of memory anew from here; False where that cannot be."""
    if device.type != "cuda":
        return reset_process_peak()
    reset_peak(device)
    return True


def _cell(name: str, rows: int, length: int, outcome: Outcome) -> Cell:
    if isinstance(outcome, str):
        return Cell(name, rows, length, None, outcome)
    return Cell(name, rows, length, Speed.of(outcome, rows), None)


def _weights_bytes(model: Any) -> int:
    """Bytes of the model's parameters and buffers, tied ones once."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def _machine(session: Session) -> dict[str, Any]:
    """What was measured on, and in which numbers."""
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
