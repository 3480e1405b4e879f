"""What the user must be told of a split's sources: how each was read, and what was set aside of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from training_lens.errors import DatasetError
from training_lens.utils.limits import BAD_ROWS

# No source makes a report grow without end, whatever it invents in each row.
MOST_KEYS = 200
MOST_KINDS = 50
MORE_KEYS = "other keys"
MORE_KINDS = "other reasons"


@dataclass
class BadRows:
    """Rows of one source that cannot be used for one reason: the first one's message, and every row's number."""

    message: str
    rows: list[int] = field(default_factory=list)


class DataNotes:
    """Collects per source what the user must be told; written to the split's report.

    Memory is bounded but for the numbers of bad rows. One thread may read rows while another one tokenizes: each
    method changes one entry alone, and a source's rows are reported in any order.
    """

    def __init__(self) -> None:
        self.mappings: dict[str, str] = {}
        self._remarks: dict[str, Counter[str]] = {}
        self._ignored: dict[str, Counter[str]] = {}
        self._marks: dict[str, Counter[str]] = {}
        self._bad: dict[str, dict[str, BadRows]] = {}

    def add_mapping(self, source: str, described: str) -> None:
        """Note how a source's fields are read: 'question -> answer'."""
        self.mappings[source] = described

    def add_remark(self, source: str, sentence: str) -> None:
        """Note a sentence about a source; each is told once, with how often it was said."""
        self._remarks.setdefault(source, Counter())[sentence] += 1

    def ignore_key(self, source: str, key_path: str) -> None:
        """Count a key that nothing reads, such as 'meta.score' or 'messages[].emotion'."""
        counts = self._ignored.setdefault(source, Counter())
        counts[key_path if key_path in counts or len(counts) < MOST_KEYS else MORE_KEYS] += 1

    def add_end_mark(self, source: str, mark: str) -> None:
        """Count a literal end mark that was taken off an answer."""
        self._marks.setdefault(source, Counter())[mark] += 1

    def add_bad_row(self, source: str, row_number: int, kind: str, message: str) -> None:
        """Note a row that cannot be used.

        Args:
            kind: the reason in a form that rows share; rows of one kind are counted together.
            message: the error of this row; that of a kind's first row is shown.
        """
        kinds = self._bad.setdefault(source, {})
        kind = kind if kind in kinds or len(kinds) < MOST_KINDS else MORE_KINDS
        kinds.setdefault(kind, BadRows(message)).rows.append(row_number)
        if len(kinds[kind].rows) > BAD_ROWS:
            raise DatasetError(f"{message} So it is with over {BAD_ROWS:,} rows of {source}.")

    @property
    def remarks(self) -> dict[str, dict[str, int]]:
        """Of each source the sentences in the order first said, each with how often."""
        return {source: dict(counts) for source, counts in self._remarks.items()}

    @property
    def ignored_keys(self) -> dict[str, dict[str, int]]:
        """Of each source the keys that nothing reads, each with how often it stands there."""
        return {source: dict(counts) for source, counts in self._ignored.items()}

    @property
    def end_marks(self) -> dict[str, int]:
        """The literal end marks that were taken off answers of all sources, with how often."""
        return dict(sum(self._marks.values(), Counter[str]()))

    @property
    def bad_rows(self) -> dict[str, dict[str, BadRows]]:
        """Of each source the rows that cannot be used, by kind."""
        return self._bad

    @property
    def bad_row_reasons(self) -> dict[str, dict[str, list[int]]]:
        """Of each source why rows cannot be used, worded as for the first such row, and the numbers of these rows."""
        return {source: _group_by_reason(source, kinds) for source, kinds in self._bad.items()}


def _group_by_reason(source: str, kinds: Mapping[str, BadRows]) -> dict[str, list[int]]:
    reasons: dict[str, list[int]] = {}
    for bad in kinds.values():
        reasons.setdefault(strip_location(bad.message, source, bad.rows[0]), []).extend(bad.rows)
    return {reason: sorted(rows) for reason, rows in reasons.items()}


def collect_row_numbers(kinds: Mapping[str, BadRows]) -> frozenset[int]:
    """The numbers of all rows of these kinds."""
    return frozenset(number for bad in kinds.values() for number in bad.rows)


def strip_location(message: str, source: str, number: int) -> str:
    """What a row's error message says besides the row's place.

    Example:
        >>> strip_location("a.csv, row 3: has 1 cells", "a.csv", 3)
        'has 1 cells'
    """
    for unit in ("row", "line"):
        message = message.removeprefix(f"{source}, {unit} {number}")
    return message.lstrip(":, ")


def classify_error(error: Exception, source: str, number: int) -> str:
    """What errors of other rows share with this one: its kind, or its reason without numbers."""
    kind = error.kind if isinstance(error, DatasetError) else None
    return kind or re.sub(r"\d+", "#", strip_location(str(error), source, number))


def count_rows(count: int) -> str:
    """'1 row', '1,200 rows'."""
    return f"{count:,} row{'' if count == 1 else 's'}"


def list_rows(numbers: Iterable[int], shown: int = 5) -> str:
    """Row numbers for a message: 'row 3', 'rows 3, 7 and 12', 'rows 1, 2, 3, 4, 5 and 95 more'."""
    ordered = sorted(numbers)
    if len(ordered) == 1:
        return f"row {ordered[0]}"
    head, more = ordered[:shown], len(ordered) - shown
    if more > 0:
        return f"rows {', '.join(map(str, head))} and {more} more"
    return f"rows {', '.join(map(str, head[:-1]))} and {head[-1]}"
