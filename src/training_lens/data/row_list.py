"""A file that lists rows by their ids, such as those that a run leaves out: one id a line, `data/rows.jsonl:17`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training_lens.config.data_sections import DataSection
from training_lens.data.sources import DataSource
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import DatasetError
from training_lens.utils.formatting import did_you_mean, suggest_path
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home

logger = get_logger(__name__)
KEY = "data.exclude"
NAMED = 5  # unknown ids that an error names


@dataclass(frozen=True)
class RowList:
    """The rows of a file: the number of the line that names it, by source and row number."""

    path: Path
    lines: dict[tuple[str, int], int]

    def find_rows(self, dataset: TokenDataset) -> np.ndarray:
        """Which examples are listed, (examples,) bool."""
        wanted = self.numbers_by_source
        found = np.zeros(len(dataset), dtype=bool)
        for source, numbers in wanted.items():
            found |= (dataset.files == source) & np.isin(dataset.row_numbers, list(numbers))
        return found

    @property
    def numbers_by_source(self) -> dict[str, frozenset[int]]:
        """The listed row numbers of each source."""
        numbers: dict[str, set[int]] = {}
        for source, number in self.lines:
            numbers.setdefault(source, set()).add(number)
        return {source: frozenset(found) for source, found in numbers.items()}

    def require_rows(self, dataset: TokenDataset) -> None:
        """Check that every listed id is one of the examples.

        Raises:
            DatasetError: names those that are none, with file and line.
        """
        found = np.flatnonzero(self.find_rows(dataset))
        there = set(zip(dataset.files[found].tolist(), dataset.row_numbers[found].tolist(), strict=True))
        self._refuse_unknown(there, sorted({str(name) for name in dataset.files}))

    def require_rows_of(self, sources: Sequence[DataSource], data: DataSection) -> None:
        """Check that every listed id is a row of the sources. Cost: reads the sources that are named once.

        Raises:
            DatasetError: as `require_rows`; or a source cannot be read.
        """
        there, skip = set[tuple[str, int]](), (lambda *_: None) if data.on_bad_row == "skip" else None
        for source in sources:
            if wanted := self.numbers_by_source.get(source.name):
                numbers = (row.number for row in source.read_rows(data, skip))
                there |= {(source.name, number) for number in numbers if number in wanted}
        self._refuse_unknown(there, [source.name for source in sources])

    def _refuse_unknown(self, there: Iterable[tuple[str, int]], sources: Sequence[str]) -> None:
        known = set(there)
        unknown = [(line, *row) for row, line in self.lines.items() if row not in known]
        if not unknown:
            return
        named = "; ".join(f"line {line}: {source}:{number}" for line, source, number in unknown[:NAMED])
        more = f"; and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        other = next((source for _, source, _ in unknown if source not in sources), None)
        hint = (
            did_you_mean(other, sources, otherwise=f" The sources are {', '.join(sources[:NAMED])}.") if other else ""
        )
        raise DatasetError(
            f"{KEY}: {self.path} names {len(unknown)} rows that data.train does not give: {named}{more}.{hint} An id "
            "is a source as data.train names it, a colon, and the row's number from 1; a row that was dropped (too "
            "long, nothing to learn) has none. Correct these lines, or take them out."
        )


def read_row_list(path: str | Path, key: str = KEY) -> RowList:
    """The rows that a file lists. What stands behind a tab is a remark; so are empty lines and those with # first.

    Args:
        key: what named the file, for errors.

    Raises:
        DatasetError: the file is missing, unreadable or names no row, or a line is no id; names file and line.
    """
    file = expand_home(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DatasetError(f"{key}: '{path}' is not there.{suggest_path(file)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{key}: {path} cannot be read as text ({error}). Give a file of row ids.") from error
    lines: dict[tuple[str, int], int] = {}
    for line, content in enumerate(text.splitlines(), 1):
        row_id = content.partition("\t")[0].strip()
        if not row_id or row_id.startswith("#"):
            continue
        source, _, number = row_id.rpartition(":")
        if not source or not number.isdecimal():
            raise DatasetError(
                f"{key}: {path}, line {line}: {row_id[:80]!r} is no row id; expected a source and a row number, such "
                "as data/rows.jsonl:17."
            )
        lines.setdefault((source, int(number)), line)
    if not lines:
        raise DatasetError(f"{key}: {path} names no row. Leave out {KEY}, or list ids, one a line.")
    return RowList(file, lines)


def read_excluded_rows(sources: Sequence[DataSource], data: DataSection) -> dict[str, frozenset[int]]:
    """The row numbers by source that data.exclude lists, logged; none without it.

    Raises:
        DatasetError: as `read_row_list` and `RowList.require_rows_of`.
    """
    if data.exclude is None:
        return {}
    listed = read_row_list(data.exclude)
    listed.require_rows_of(sources, data)
    logger.info("data.exclude: %d rows are left out, as %s lists them", len(listed.lines), listed.path)
    return listed.numbers_by_source
