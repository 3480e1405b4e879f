"""Dropout whose mask at a token is the token's own: the same in every batch, order and process.

What is dropped depends on the run's seed, the step, the example, the token's place in it, and the layer. So one process
and many drop the same, packed and padded batches do, a pass that is recomputed does, and a step that is repeated.

A token t draws two numbers a_t and d_t for each layer, by a hash of all that, and drops column c where a_t b_c + d_t
modulo 2^32 is below p 2^32, with a fixed b_c of each column (multiply-add hashing, Dietzfelbinger 1996): every number
is dropped with probability p, and any two of a token independently of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training_lens.models.fast.native import training_kernels as native
from training_lens.models.fast.native.library import can_compute
from training_lens.models.fast.recognition import GATE_UP, QUERY_KEY_VALUE
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
ONE_INPUT = {name: names[0] for names in (*QUERY_KEY_VALUE, *GATE_UP) for name in names}  # projections that share one


def draw_example_keys(seed: int, step: int, positions: Sequence[int]) -> Int[Tensor, " examples"]:
    """What a step's examples drop by; `positions` are theirs in the training data. One that comes twice drops alike."""
    key = _mix(torch.tensor(seed))
    for part in (torch.tensor(step), torch.tensor(positions, dtype=torch.int64)):
        key = _mix(key + part)
    return key


def draw_token_keys(
    example_keys: Int[Tensor, " examples"], lengths: Sequence[int], width: int | None
) -> Int[Tensor, " tokens"]:
    """What the tokens of a micro-batch drop by, rows one after the other.

    Args:
        lengths: of packed examples, in one row; or
        width: of padded rows, one for each example.
    """
    counts = torch.tensor(lengths) if width is None else torch.full_like(example_keys, width)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return _mix(example_keys.repeat_interleave(counts) + torch.arange(len(starts)) - starts)


def _mix(key: Tensor) -> Tensor:
    """A permutation of 64-bit numbers in which neighbours go far apart (splitmix64, Steele, Lea and Flood 2014)."""
    key = key + (0x9E3779B97F4A7C15 - 2**64)
    key = (key ^ _shift(key, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    key = (key ^ _shift(key, 27)) * (0x94D049BB133111EB - 2**64)
    return key ^ _shift(key, 31)


def _shift(key: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    shifted: Tensor = (key >> bits) & (2 ** (64 - bits) - 1)
    return shifted


@lru_cache(maxsize=64)
def _column_numbers(width: int, device: torch.device) -> Int[Tensor, " width"]:
    """b_c of each column, int32; no two are the same."""
    numbers = torch.arange(width, dtype=torch.int64) * 0x9E3779B1  # odd, so this is a permutation of 32 bits
    numbers = (numbers ^ ((numbers & 0xFFFFFFFF) >> 15)) * 0x85EBCA77
    return numbers.view(torch.int32)[::2].clone().to(device)


class TokenDraws:
    """What the dropouts of a model draw in the pass that runs; they share one of these."""

    def __init__(self) -> None:
        self._layers: dict[str, int] = {}  # a key of each input that is dropped, by its name
        self._draws: dict[str, Tensor] = {}
        self._tokens = 0
        self._is_said = False

    def add_layer(self, path: str) -> str:
        """The name of what goes into a dropout of this path: layers that read one input drop it alike."""
        name = ".".join(ONE_INPUT.get(part, part) for part in path.split("."))
        digest = blake2b(name.encode(), digest_size=8).digest()
        self._layers[name] = int.from_bytes(digest, "little", signed=True)
        return name

    def begin_pass(self, token_keys: Int[Tensor, " tokens"] | None) -> None:
        """Draw for a pass over these tokens; None: dropouts draw by torch's random state.

        Holds until the next pass, as a layer may be recomputed in the backward pass.
        Memory: 8 bytes for each token and layer.
        """
        self._draws = {}
        if token_keys is None or not self._layers:
            return
        self._tokens = len(token_keys)
        layers = torch.tensor(list(self._layers.values()), device=token_keys.device)
        drawn = _mix(layers[:, None] ^ token_keys).view(torch.int32).view(len(layers), -1, 2)
        self._draws = dict(zip(self._layers, drawn, strict=True))

    def find(self, name: str, rows: int) -> Int[Tensor, "rows 2"] | None:
        """What the tokens of a layer's input draw; None where its rows are not the pass's tokens."""
        if not self._draws:
            return None
        if rows == self._tokens:
            return self._draws[name]
        if not self._is_said:
            self._is_said = True
            logger.info(
                "%s drops inputs of %d rows of %d tokens: such masks come from each process's own random state, and "
                "differ from those of another number of processes", name, rows, self._tokens,
            )  # fmt: skip
        return None


def drop_columns(
    x: Float[Tensor, "*tokens width"], draws: Int[Tensor, "tokens 2"], share: float
) -> Float[Tensor, "*tokens width"]:
    """Zero where a token's draw says so, with probability `share`, and x / (1 - share) elsewhere.

    Kept: the draws. The gradient is dropped alike.
    """
    y: Tensor = _DropColumns.apply(x, draws, share)
    return y


class _DropColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, draws: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(draws)
        ctx.share = share
        return _apply_draws(x, draws, share)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (draws,) = ctx.saved_tensors
        return drop_columns(dy, draws, ctx.share), None, None


def _apply_draws(x: Tensor, draws: Tensor, share: float) -> Tensor:
    columns, least, scale = _column_numbers(x.shape[-1], x.device), round(share * 2**32) - 2**31, 1 / (1 - share)
    if can_compute(x):
        return native.drop_columns(x, draws, columns, least, scale)
    numbers = torch.addcmul(draws[:, 1:], draws[:, :1], columns)  # modulo 2^32, from -2^31
    return (x * scale).masked_fill_((numbers < least).view(x.shape), 0)
