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
    available_bytes,
    free_memory,
    peak_bytes,
    reset_peak,
)
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
USUAL = 4096  # tokens, more bring no speed on a CPU
MOST = {"cuda": 32768}
LEAST = 256
SHARE = 0.8  # of the free memory that is counted on
KEPT = 4  # numbers for each width of a linear layer; autograd was seen to keep 1.0 (Llama) to 3.3 (GPT-2, dropout)
WEIGHED = 512  # tokens of an example up to which the weights of attention are kept
OPTIMIZED = 16  # bytes of a trained number: itself, its gradient, two moments
BUFFERS = 2**29  # bytes for a chunk of logits with its gradient, and what libraries set aside
PACKED = {"4bit": 0.6, "8bit": 1.1}  # bytes of a quantized weight, with its scales


@dataclass(frozen=True)
class Footprint:
    """Memory that training takes, in bytes: what is always there, and what each token of a micro-batch adds."""

    fixed: float
    token: float


def footprint(skeleton: Any, config: TrainingConfig, precision: Precision) -> Footprint:
    """What training a model will take, from the sizes of its modules alone: an upper bound for what autograd keeps.

    Fixed: the weights, buffers, and for each number of the adapter itself, its gradient and two moments. A token:
    `KEPT` numbers for what goes into and comes out of each linear layer, and its weights of attention; with gradient
    checkpointing that of one layer, and the inputs of all.

    Args:
        skeleton: the base with its adapter; its weights may be missing.
        config: with the longest example settled.
    """
    text = skeleton.config.get_text_config()
    layers, longest = text.num_hidden_layers, min(config.model.seq_len or WEIGHED, WEIGHED)
    weights = layers * getattr(text, "num_attention_heads", 0) * longest
    numbers = KEPT * _widths(skeleton) + weights
    if config.training.gradient_checkpointing:
        numbers = numbers // layers + layers * text.hidden_size
    parameters, size = count_parameters(skeleton), DTYPES[precision].itemsize
    frozen = parameters.total - parameters.trainable
    fixed = frozen * PACKED.get(config.model.quantization, size) + parameters.trainable * OPTIMIZED
    return Footprint(fixed + BUFFERS, numbers * size)


def _widths(skeleton: Any) -> int:
    """The sum over the decoder's frozen matrices of what goes in and comes out; embeddings have no product."""
    tables = {id(m.weight) for m in skeleton.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = (p for p in skeleton.parameters() if p.ndim > 1 and not p.requires_grad and id(p) not in tables)
    return sum(p.shape[-1] + p.shape[-2] for p in matrices)


def affordable(free: int | None, needs: Footprint, device: torch.device) -> int:
    """The largest power of two of tokens whose pass fits, from `LEAST` to the most that bring speed on the device.

    Powers of two, so that a little more or less free memory seldom cuts a run otherwise, which would change its bits.

    Args:
        free: bytes; None where the system does not say: then `USUAL`.
    """
    if free is None:
        return USUAL
    tokens = int(max(0.0, SHARE * free - needs.fixed) / needs.token)
    return min(MOST.get(device.type, USUAL), max(LEAST, 1 << max(0, tokens.bit_length() - 1)))


def planned(needs: Footprint, device: torch.device, processes: int) -> int:
    """The budget before the model is loaded; the processes of a run share a CPU's memory, and have a GPU each."""
    free = available_bytes(device)
    return affordable(free if free is None or device.type == "cuda" else free // processes, needs, device)


def measured(device: torch.device, step: Callable[[], int], trainable: int) -> int:
    """The budget by the peak of a pass on a CUDA device, with the model loaded.

    Args:
        step: a forward and backward pass that keeps nothing; gives its tokens.
        trainable: numbers of the adapter, whose moments take their memory later.
    """
    free_memory(device)
    reset_peak(device)
    before = torch.cuda.memory_allocated(device)
    try:
        tokens = step()
    except Exception as error:  # memory runs out by several kinds of error
        if not is_out_of_memory(error):
            raise
        logger.warning("memory ran out in a pass to measure it; micro-batches begin with %d tokens", LEAST)
        return LEAST
    taken = peak_bytes(device) - before
    free_memory(device)
    return affordable(available_bytes(device), Footprint(OPTIMIZED * trainable, taken / tokens), device)


@contextmanager
def explain_out_of_memory(config: TrainingConfig) -> Iterator[None]:
    """Turns memory that runs out in the block into an `OutOfMemoryError` that says which settings to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        budget = config.training.micro_batch_tokens
        ways = (
            [] if budget == "auto" else [f"lower training.micro_batch_tokens (now {budget}; never changes the result)"]
        )
        ways += [f"lower model.seq_len (now {config.model.seq_len})"]
        ways += [] if config.training.gradient_checkpointing else ["set training.gradient_checkpointing=true"]
        ways += [] if config.model.quantization == "4bit" else ["set model.quantization=4bit"]
        raise OutOfMemoryError(
            f"the run does not fit into memory: {describe_error(error)} Do any: {'; '.join(ways)}."
        ) from error
