"""Bad rows: collected one by one, reported together by reason, with their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from training_lens.config.data_sections import DataSection
from training_lens.data.notes import DataNotes, classify_error, count_rows, list_rows
from training_lens.errors import DatasetError

Result = TypeVar("Result")
SHOWN_KINDS = 8


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
        yield f"and {count_rows(sum(len(rows) for _, rows in ordered[SHOWN_KINDS:]))} for other reasons"


def describe_bad_rows(reasons: Mapping[str, Mapping[str, list[int]]]) -> Iterator[str]:
    """A line for each source of which rows were left out, and for each reason; `reasons` as `DataNotes.reasons`."""
    for source, rows in reasons.items():
        count = count_rows(sum(map(len, rows.values())))
        yield f"{source}: {count} cannot be used, left out (data.on_bad_row=skip)"
        yield from (f"  {line}" for line in describe_reasons(rows))


def bad_rows_error(notes: DataNotes, usable: Mapping[str, int]) -> DatasetError | None:
    """One error that names all bad rows of all sources; None if there are none.

    Args:
        usable: the number of usable rows of each source.
    """
    paragraphs = [_describe_source(source, notes, usable.get(source, 0)) for source in notes.bad_rows]
    if not paragraphs:
        return None
    if all(usable.get(source) for source in notes.bad_rows):
        bad = sum(len(kind.rows) for kinds in notes.bad_rows.values() for kind in kinds.values())
        paragraphs.append(f"To go on without {'it' if bad == 1 else 'them'}: data.on_bad_row=skip.")
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
