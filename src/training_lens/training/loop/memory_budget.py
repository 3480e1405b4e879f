"""How many tokens a micro-batch may have: a power of two that fits into memory and is no larger than helps speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from training_lens.config.schema import TrainingConfig
from training_lens.errors import OutOfMemoryError
from training_lens.models.adapters import count_parameters
from training_lens.utils.devices import (
    DTYPES,
    Precision,
    allocated_bytes,
    available_bytes,
    counts_memory,
    free_memory,
    peak_bytes,
    reset_peak,
)
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
USUAL_TOKENS = 4096  # more bring no speed on a CPU
MOST_TOKENS = 32768  # of a GPU that counts its memory
LEAST_TOKENS = 256
REHEARSED_TOKENS = 2048  # of the pass whose memory is measured; fewer where they do not fit
USABLE_SHARE = 0.8  # of the free memory
# Numbers that autograd saves for each width of a linear layer; measured: 1.0 (Llama) to 3.3 (GPT-2 with dropout).
SAVED_PER_WIDTH = 4
ATTENTION_TOKENS = 512  # of an example; attention weights of longer ones are not saved
BYTES_PER_TRAINED = 16  # of a trained number: itself, its gradient, two moments
BUFFER_BYTES = 2**29  # bytes for a chunk of logits with its gradient, and what libraries set aside
QUANTIZED_BYTES = {"4bit": 0.6, "8bit": 1.1}  # bytes of a quantized weight, with its scales


@dataclass(frozen=True)
class Footprint:
    """Memory that training takes, in bytes: `fixed` in any case, `token` for each token of a micro-batch."""

    fixed: float
    token: float


def estimate_footprint(skeleton: Any, config: TrainingConfig, precision: Precision) -> Footprint:
    """The memory that training will take, from the shapes of the modules alone; an upper bound of what autograd saves.

    Fixed: the weights, buffers, and for each number of the adapter itself, its gradient and two moments. Per token:
    `SAVED_PER_WIDTH` numbers for each input and output width of a linear layer, and the attention weights. With
    gradient checkpointing: those of one layer, and the inputs of all layers.

    Args:
        skeleton: the base with its adapter; its weights may be missing.
        config: with `seq_len` resolved.
    """
    numbers = count_saved_numbers(skeleton, config.model.seq_len, config.training.gradient_checkpointing)
    matrices = list_frozen_matrices(skeleton)
    parameters, size = count_parameters(skeleton), DTYPES[precision].itemsize
    end = skeleton.get_output_embeddings()
    head = getattr(getattr(end, "original_module", end), "weight", None)  # in PEFT's wrapper where its rows are trained
    quantizable = sum(p.numel() for p in matrices if p is not head)  # embeddings, head and norms keep their dtype
    frozen = parameters.total - parameters.trainable - quantizable
    fixed = frozen * size + quantizable * QUANTIZED_BYTES.get(config.model.quantization, size)
    return Footprint(fixed + parameters.trainable * BYTES_PER_TRAINED + BUFFER_BYTES, numbers * size)


def list_frozen_matrices(skeleton: Any) -> list[torch.nn.Parameter]:
    """The frozen weights that tokens are multiplied by: all but vectors and embedding tables."""
    tables = {id(m.weight) for m in skeleton.modules() if isinstance(m, torch.nn.Embedding)}
    return [p for p in skeleton.parameters() if p.ndim > 1 and not p.requires_grad and id(p) not in tables]


def count_saved_numbers(skeleton: Any, seq_len: int | None, is_checkpointed: bool) -> int:
    """Numbers that autograd saves for each token, at most; see `estimate_footprint`."""
    text = skeleton.config.get_text_config()
    layers, longest = text.num_hidden_layers, min(seq_len or ATTENTION_TOKENS, ATTENTION_TOKENS)
    weights = layers * getattr(text, "num_attention_heads", 0) * longest
    widths = sum(p.shape[-1] + p.shape[-2] for p in list_frozen_matrices(skeleton))
    numbers: int = SAVED_PER_WIDTH * widths + weights
    return numbers // layers + layers * text.hidden_size if is_checkpointed else numbers


def affordable_tokens(free: int | None, needs: Footprint, device: torch.device) -> int:
    """The largest power of two of tokens whose pass fits into memory, between `LEAST_TOKENS` and `MOST_TOKENS`.

    Powers of two: a little more or less free memory then seldom changes how a run is cut, and with it its bits.

    Args:
        free: bytes; None where the system does not say, which gives `USUAL_TOKENS`.
    """
    if free is None:
        return USUAL_TOKENS
    tokens = int(max(0.0, USABLE_SHARE * free - needs.fixed) / needs.token)
    most = MOST_TOKENS if counts_memory(device) else USUAL_TOKENS
    return min(most, max(LEAST_TOKENS, 1 << max(0, tokens.bit_length() - 1)))


def plan_token_budget(needs: Footprint, device: torch.device, processes: int) -> int:
    """The token budget before the model is loaded. Processes share a CPU's memory, and have a GPU each."""
    free = available_bytes(device)
    return affordable_tokens(free if free is None or counts_memory(device) else free // processes, needs, device)


def measure_token_budget(device: torch.device, step: Callable[[int], int], trainable: int) -> int:
    """The token budget from the peak memory of one pass on a device that counts it, with the model loaded.

    Args:
        step: runs a forward and backward pass of at most so many tokens that leaves nothing behind; returns its tokens.
        trainable: numbers of the adapter; their moments are allocated later.
    """
    bytes_per_token = measure_token_bytes(device, step)
    if bytes_per_token is None:
        return LEAST_TOKENS
    return affordable_tokens(available_bytes(device), Footprint(BYTES_PER_TRAINED * trainable, bytes_per_token), device)


def measure_token_bytes(device: torch.device, step: Callable[[int], int]) -> float | None:
    """Bytes that a pass takes for each of its tokens; None where not even `LEAST_TOKENS` fit. See above for `step`."""
    tokens = REHEARSED_TOKENS
    while tokens >= LEAST_TOKENS:
        free_memory()
        reset_peak(device)
        before = allocated_bytes(device)
        try:
            done = step(tokens)
        except Exception as error:  # memory runs out by several kinds of error
            if not is_out_of_memory(error):
                raise
            logger.warning("memory ran out in a pass of %d tokens, by which it was to be measured", tokens)
            tokens //= 2
            continue
        taken = peak_bytes(device) - before
        free_memory()
        return taken / done
    return None


@contextmanager
def explain_out_of_memory(config: TrainingConfig) -> Iterator[None]:
    """Turns memory that runs out in the block into an `OutOfMemoryError` that says which settings to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        budget = config.training.micro_batch_tokens
        remedies = {  # remedy -> whether it can help here
            f"lower training.micro_batch_tokens (now {budget}; never changes the result)": budget != "auto",
            f"lower model.seq_len (now {config.model.seq_len})": True,
            "set training.gradient_checkpointing=true": not config.training.gradient_checkpointing,
            "set model.quantization=4bit": config.model.quantization != "4bit",
        }
        helpful = "; ".join(remedy for remedy, helps in remedies.items() if helps)
        raise OutOfMemoryError(
            f"the run does not fit into memory: {describe_error(error)} Do any: {helpful}."
        ) from error
