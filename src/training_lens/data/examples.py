"""The values of the data path: rows, messages, examples, text segments, tokenized examples, batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from training_lens.config.data_sections import CsvSection
from training_lens.errors import DatasetError

if TYPE_CHECKING:
    import numpy as np
    import torch

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source; `number` counts from 1 (JSONL: the line; CSV: the spreadsheet row)."""

    file: str
    number: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `input` is the second part of a prompt in some instruction data (Alpaca's input). `learn` is false if the row masks
    this answer. `calls` are an assistant's tool calls, each with "name", "arguments" and optionally "id". `extra` holds
    "name" and "tool_call_id" for the chat template. `null_content`: the row's content is null, as some templates
    require.
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
        """The calls without their ids, which only number them within one conversation."""
        return [{key: value for key, value in call.items() if key != "id"} for call in self.calls]


Turns = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """Messages that end with an assistant's, the row that they come from, and optionally a domain.

    `tools` describe what the chat may call. A plain text (`is_text`) is one assistant message without a template.
    """

    messages: Turns
    domain: str | None
    file: str
    row: int
    tools: tuple[Mapping[str, Any], ...] = ()
    is_text: bool = False

    @property
    def id(self) -> str:
        """File and row: 'data/train.jsonl:17'."""
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A piece of rendered text.

    `response` marks an assistant's answer, including its end token. In `plain` text, names of special tokens are
    ordinary characters.
    """

    text: str
    response: bool
    plain: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """`input_ids` (length,) int32 and `loss_mask` (length,) bool, which is true for supervised tokens.

    `digest` is a hash of the rendered text: equal for duplicates, also where white space differs. `identity` is that of
    `row_identity.RowIdentity.columns`; empty if unknown.
    """

    file: str
    row: int
    input_ids: np.ndarray
    loss_mask: np.ndarray
    domain: str | None
    digest: int = 0
    identity: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """As `Example.id`."""
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: rows padded on the right, or (`is_packed`) all examples packed into one row.

    No attention mask: under causal attention no real token sees the padding to its right, and padding has no loss, so
    its id never matters. In a packed batch, the cumulative sum of `lengths` is `cu_seqlens`.
    """

    input_ids: torch.Tensor  # (rows, width) int64
    loss_mask: torch.Tensor  # (rows, width) bool: this token is a target
    lengths: tuple[int, ...]
    example_ids: tuple[str, ...]
    is_packed: bool = False
    positions: tuple[int, ...] = ()  # of the examples in their dataset; empty where nobody asks

    def move_to(self, device: torch.device) -> Batch:
        return replace(self, input_ids=self.input_ids.to(device), loss_mask=self.loss_mask.to(device))


OnBadRow = Callable[[int, DatasetError], None]  # takes the row number and the error
AddRemark = Callable[[str], None]


def ignore_remark(_: str) -> None:
    """Discard a reader's remark."""


@dataclass(frozen=True)
class SourceFile:
    """A file that is read.

    `on_bad_row` gets a row that cannot be read, which is then skipped; None makes it an error. `add_remark` gets
    sentences about how the file is read, where that does not follow from its name.
    """

    path: Path
    csv: CsvSection = field(default_factory=CsvSection)
    on_bad_row: OnBadRow | None = None
    add_remark: AddRemark = ignore_remark

    def build_row(self, number: int, values: dict[str, Any]) -> Row:
        return Row(str(self.path), number, values)

    def refuse_row(self, number: int, problem: str, *, kind: str | None = None, unit: str = "row") -> None:
        """Report a bad row to `on_bad_row`.

        Raises:
            DatasetError: there is no `on_bad_row`.
        """
        error = DatasetError(f"{self.path}, {unit} {number}: {problem}", kind=kind)
        if self.on_bad_row is None:
            raise error
        self.on_bad_row(number, error)
