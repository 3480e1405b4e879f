"""The file that a reader reads, with its settings, its remarks and its handling of bad rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_lens.config.data_sections import CsvSection
from training_lens.data.examples import Row
from training_lens.errors import DatasetError

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
