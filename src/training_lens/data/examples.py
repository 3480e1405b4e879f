"""The plain values of the main path: rows become examples, rendered text, tokens, batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its source holds it; `number` counts from 1 (JSONL: the line; CSV: the spreadsheet's row)."""

    file: str
    number: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `input` is the second part that some instruction data gives a prompt (Alpaca's input); `learn` is false where the
    row marks an answer as not to be learned; `calls` are the functions that an assistant calls beside what it says,
    each with "name", "arguments" and, where the row has one, "id"; `extra` is what else a chat template may want to
    know: "name" and "tool_call_id". `null_content`: the row has null where the text stands, which some templates ask
    for.
    """

    role: Role
    text: str
    input: str = ""
    learn: bool = True
    calls: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    null_content: bool = False

    @property
    def calls_without_ids(self) -> list[dict[str, Any]]:
        """What the calls say: an id is a name for the log of one conversation, and says nothing."""
        return [{key: value for key, value in call.items() if key != "id"} for call in self.calls]


@dataclass(frozen=True, slots=True)
class Example:
    """What every format becomes: messages that end with the assistant's, where from, and optionally a domain.

    `tools` describe what a chat may call. A plain text (`is_text`) is one assistant message that no template touches.
    """

    messages: tuple[Message, ...]
    domain: str | None
    file: str
    row: int
    tools: tuple[Mapping[str, Any], ...] = ()
    is_text: bool = False

    @property
    def id(self) -> str:
        """Stable, and leads a person to the row: 'data/train.jsonl:17'."""
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A stretch of rendered text.

    `response` marks an assistant's answer with the end token that the template gives it; in `plain` text the names
    of special tokens are letters like any others.
    """

    text: str
    response: bool
    plain: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """`input_ids` int32 and `loss_mask` bool of one length; the mask is true on the tokens that are learned.

    `digest` is a hash of the whole rendered text: two examples of one digest say the same.
    """

    file: str
    row: int
    input_ids: np.ndarray
    loss_mask: np.ndarray
    domain: str | None
    digest: int = 0

    @property
    def id(self) -> str:
        """As `Example.id`."""
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: rows padded on the right, or (`in_line`) one row of examples one behind the other.

    No attention mask: under causal attention no real token can see the padding to its right, and no loss is taken
    on it, so the padding's id and contents never matter. In a line, `lengths` tell where examples end.
    """

    input_ids: torch.Tensor  # (rows, width) int64
    loss_mask: torch.Tensor  # (rows, width) bool: the token at this place is a target
    lengths: tuple[int, ...]
    example_ids: tuple[str, ...]
    in_line: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def to(self, device: torch.device) -> Batch:
        return replace(self, input_ids=self.input_ids.to(device), loss_mask=self.loss_mask.to(device))
