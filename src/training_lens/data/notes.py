"""Remarks on a split's sources: how each was read, which keys were ignored, and which rows are bad and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from training_lens.config.data_sections import DataSection
from training_lens.errors import DatasetError
from training_lens.utils.formatting import pluralize
from training_lens.utils.limits import BAD_ROWS

# Limits that keep a report bounded, whatever the rows hold.
MOST_KEYS = 200
MOST_KINDS = 50
MORE_KEYS = "other keys"
MORE_KINDS = "other reasons"
SHOWN_KINDS = 8  # of an error's or a report's source
Result = TypeVar("Result")


@dataclass
class BadRows:
    """Rows of one source that are bad for one reason: the first one's message, and all row numbers."""

    message: str
    rows: list[int] = field(default_factory=list)


@dataclass
class DataNotes:
    """Collects remarks, ignored keys and bad rows by source, for the split's report.

    Memory is bounded, except for the numbers of bad rows. One thread may read rows while another tokenizes: each
    method changes only one entry, and rows may be reported in any order.

    `mappings`: how each source's fields are read ('question -> answer'). `remarks`: source -> sentence -> count, in the
    order of first use. `ignored_keys`: source -> key that nothing reads -> count. `end_marks`: literal end mark removed
    from answers of any source -> count. `bad_rows`: source -> kind -> bad rows.
    """

    mappings: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, dict[str, int]] = field(default_factory=dict)
    ignored_keys: dict[str, dict[str, int]] = field(default_factory=dict)
    end_marks: Counter[str] = field(default_factory=Counter)
    bad_rows: dict[str, dict[str, BadRows]] = field(default_factory=dict)

    def add_remark(self, source: str, sentence: str) -> None:
        """Add a sentence about a source; equal ones are reported once, with a count."""
        counts = self.remarks.setdefault(source, {})
        counts[sentence] = counts.get(sentence, 0) + 1

    def ignore_key(self, source: str, key_path: str) -> None:
        """Count a key that nothing reads, such as 'meta.score' or 'messages[].emotion'."""
        counts = self.ignored_keys.setdefault(source, {})
        key = key_path if key_path in counts or len(counts) < MOST_KEYS else MORE_KEYS
        counts[key] = counts.get(key, 0) + 1

    def add_bad_row(self, source: str, row_number: int, kind: str, message: str) -> None:
        """Note a row that cannot be used; of each `kind` of reason, the first row's message is shown."""
        kinds = self.bad_rows.setdefault(source, {})
        kind = kind if kind in kinds or len(kinds) < MOST_KINDS else MORE_KINDS
        kinds.setdefault(kind, BadRows(message)).rows.append(row_number)
        if len(kinds[kind].rows) > BAD_ROWS:
            raise DatasetError(f"{message} So it is with over {BAD_ROWS:,} rows of {source}.")

    @property
    def bad_row_reasons(self) -> dict[str, dict[str, list[int]]]:
        """Source -> reason, worded as for the first such row -> row numbers."""
        found: dict[str, dict[str, list[int]]] = {}
        for source, kinds in self.bad_rows.items():
            reasons = found.setdefault(source, {})
            for bad in kinds.values():
                reason = strip_location(bad.message, source, bad.rows[0])
                reasons[reason] = sorted([*reasons.get(reason, []), *bad.rows])
        return found


def strip_location(message: str, source: str, number: int) -> str:
    """A row's error message without the row's location.

    Example:
        >>> strip_location("a.csv, row 3: has 1 cells", "a.csv", 3)
        'has 1 cells'
    """
    for unit in ("row", "line"):
        message = message.removeprefix(f"{source}, {unit} {number}")
    return message.lstrip(":, ")


def classify_error(error: Exception, source: str, number: int) -> str:
    """A key for errors with the same reason: the error's kind, or its message without numbers."""
    kind = error.kind if isinstance(error, DatasetError) else None
    return kind or re.sub(r"\d+", "#", strip_location(str(error), source, number))


def list_rows(numbers: Iterable[int], shown: int = 5) -> str:
    """Row numbers for a message: 'row 3', 'rows 3, 7 and 12', 'rows 1, 2, 3, 4, 5 and 95 more'."""
    ordered = sorted(numbers)
    if len(ordered) == 1:
        return f"row {ordered[0]}"
    head, more = ordered[:shown], len(ordered) - shown
    if more > 0:
        return f"rows {', '.join(map(str, head))} and {more} more"
    return f"rows {', '.join(map(str, head[:-1]))} and {head[-1]}"


@dataclass(frozen=True)
class BadRowRule:
    """What happens to a row that cannot be used: it is recorded and skipped (`skips`), or it raises."""

    skips: bool
    notes: DataNotes

    @classmethod
    def from_data(cls, data: DataSection, notes: DataNotes) -> BadRowRule:
        """The rule that `data.on_bad_row` sets."""
        return cls(data.on_bad_row == "skip", notes)

    def try_row(self, source: str, number: int, use: Callable[[], Result]) -> Result | None:
        """The result of `use` on a row; None if the row is bad and skipped.

        Raises:
            DatasetError: the row is bad and rows are not skipped.
        """
        try:
            return use()
        except DatasetError as error:
            if not self.skips:
                raise
            self.record_bad_row(source, number, error)
            return None

    def record_bad_row(self, source: str, number: int, error: DatasetError) -> None:
        """Record a row that is left out."""
        self.notes.add_bad_row(source, number, classify_error(error, source, number), str(error))


def describe_reasons(reasons: Mapping[str, list[int]]) -> Iterator[str]:
    """'rows 3, 7 and 12: has no answer', most rows first."""
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    yield from (f"{list_rows(rows)}: {reason}" for reason, rows in ordered[:SHOWN_KINDS])
    if len(ordered) > SHOWN_KINDS:
        yield f"and {pluralize(sum(len(rows) for _, rows in ordered[SHOWN_KINDS:]), 'row')} for other reasons"


def describe_bad_rows(reasons: Mapping[str, Mapping[str, list[int]]]) -> Iterator[str]:
    """A line for each source of which rows were left out, and for each reason, as in `DataNotes.bad_row_reasons`."""
    for source, rows in reasons.items():
        count = pluralize(sum(map(len, rows.values())), "row")
        yield f"{source}: {count} cannot be used, left out (data.on_bad_row=skip)"
        yield from (f"  {line}" for line in describe_reasons(rows))


def bad_rows_error(notes: DataNotes, usable: Mapping[str, int]) -> DatasetError | None:
    """One error that names all bad rows of all sources; None if there are none. `usable`: each source's other rows."""
    paragraphs = [_describe_source(source, notes, usable.get(source, 0)) for source in notes.bad_rows]
    if not paragraphs:
        return None
    if all(usable.get(source) for source in notes.bad_rows):
        bad = sum(len(kind.rows) for kinds in notes.bad_rows.values() for kind in kinds.values())
        paragraphs.append(f"To continue without {'it' if bad == 1 else 'them'}: data.on_bad_row=skip.")
    return DatasetError("\n".join(paragraphs))


def _describe_source(source: str, notes: DataNotes, usable: int) -> str:
    reasons = notes.bad_row_reasons[source]
    count = sum(map(len, reasons.values()))
    if count == 1:
        return next(iter(notes.bad_rows[source].values())).message
    which = f"{count:,} of {count + usable:,} rows" if usable else f"none of its {count:,} rows can be used"
    return "\n  ".join([f"{source}: {which}{' cannot be used' if usable else ''}:", *describe_reasons(reasons)])


def refuse_unusable_sources(notes: DataNotes, usable: Mapping[str, int]) -> None:
    """Check that every source with bad rows has usable rows, too.

    Raises:
        DatasetError: a source has none; gives the reasons.
    """
    useless = [source for source in notes.bad_rows if not usable.get(source)]
    if useless:
        raise DatasetError("\n".join(_describe_source(source, notes, 0) for source in useless))
