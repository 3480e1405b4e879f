"""The plain values of the main path: rows become examples, rendered text, tokens, batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its file holds it; `number` counts from 1 (for JSONL it is the line)."""

    file: str
    number: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `input` is the second part that some instruction data gives a prompt (Alpaca's input)."""

    role: Role
    text: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """What every format becomes: messages that end with the assistant's, where from, and optionally a domain."""

    messages: tuple[Message, ...]
    domain: str | None
    file: str
    row: int

    @property
    def id(self) -> str:
        """Stable, and leads a person to the row: 'data/train.jsonl:17'."""
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of rendered text; `response` marks an assistant's answer, with the end token the template gives it."""

    text: str
    response: bool


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """`input_ids` int32 and `loss_mask` bool of one length; the mask is true on the tokens that are learned."""

    id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    domain: str | None


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, padded on the right.

    No attention mask: under causal attention no real token can see the padding to its right, and no loss is taken
    on it, so the padding's id and contents never matter.
    """

    input_ids: torch.Tensor  # (rows, width) int64
    loss_mask: torch.Tensor  # (rows, width) bool: the token at this place is a target
    lengths: tuple[int, ...]
    example_ids: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.loss_mask.to(device), self.lengths, self.example_ids)
