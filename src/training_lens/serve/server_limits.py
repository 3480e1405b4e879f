"""The limits of a server."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from training_lens.inference.decode_loop import Decoder
from training_lens.utils.devices import available_bytes

CACHE_SHARE = 0.5  # of the memory that is free once the models are loaded
CPU_PREFILL, GPU_PREFILL = 512, 8192  # tokens of prompts that are read between two decoding steps
FALLBACK_CACHE_TOKENS = 65_536  # where the free memory is not known


@dataclass(frozen=True)
class ServerLimits:
    """Of one server.

    Args:
        rows: most answers that are decoded together.
        queue: most answers that wait; more are refused.
        cache_tokens: size of the KV cache of all rows together, free columns included.
        seconds: time limit of a request, waiting included.
        drain_seconds: time for requests in progress once the server has to stop.
        body_bytes: largest body of a request.
    """

    rows: int = 64
    queue: int = 256
    cache_tokens: int = FALLBACK_CACHE_TOKENS
    seconds: float = 600.0
    drain_seconds: float = 30.0
    body_bytes: int = 4 << 20

    def with_cache_tokens(self, count: int) -> ServerLimits:
        return replace(self, cache_tokens=count)

    @property
    def most_answers(self) -> int:
        return self.rows + self.queue


def count_cache_tokens(decoder: Decoder) -> int:
    """The tokens whose keys and values fit into half of the memory that is free now."""
    free = available_bytes(decoder.device)
    if free is None:
        return FALLBACK_CACHE_TOKENS
    config = decoder.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * len(decoder.windows) * heads * size * decoder.dtype.itemsize
    return max(1, int(CACHE_SHARE * free / token_bytes))


def prefill_tokens(device: torch.device) -> int:
    """How many tokens of prompts are read between two steps, so that rows that are decoded do not wait long."""
    return CPU_PREFILL if device.type == "cpu" else GPU_PREFILL
