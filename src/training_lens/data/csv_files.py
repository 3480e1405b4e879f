"""CSV and TSV files to rows. The delimiter is configured, or detected and reported."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from training_lens.config.data_sections import CSV_CHARACTERS, CsvSection
from training_lens.data.encodings import find_encoding
from training_lens.data.examples import Row, SourceFile
from training_lens.data.row_keys import FIELD_NAMES
from training_lens.errors import DatasetError
from training_lens.utils.limits import KEYS, ROW_BYTES

DELIMITERS = (",", ";", "\t", "|")
NAMES = {character: name for name, character in CSV_CHARACTERS.items() if name.isalpha()}
SAMPLE_CHARACTERS = 1 << 18  # of the table's beginning; with SAMPLE_ROWS, the sample that detects the delimiter
SAMPLE_ROWS = 200
CLEARLY = 0.1  # margin in the share of fitting rows that decides between two delimiters
_SEP_LINE = re.compile(r'"?sep=(.)"?[;,\t|]*(\r\n|\n|\r)', re.IGNORECASE)


def _open_reader(settings: CsvSection, delimiter: str, lines: Iterable[str], skip_spaces: bool = False) -> Any:
    """A csv reader of the lines; it refuses broken quotes."""
    quoting: Any = csv.QUOTE_NONE if settings.quotechar is None else csv.QUOTE_MINIMAL
    return csv.reader(
        lines, delimiter=delimiter, quotechar=settings.quotechar, escapechar=settings.escapechar, quoting=quoting,
        skipinitialspace=skip_spaces, strict=True,
    )  # fmt: skip


def read_csv_rows(source: SourceFile, file: IO[bytes], usual: str) -> Iterator[Row]:
    """Rows of a table whose first line names the columns; `number` is the row in a spreadsheet.

    A delimiter other than the `usual` one, which the file's name implies, is reported.

    Raises:
        DatasetError: the encoding or the delimiter is ambiguous, or a row is broken and bad rows are not skipped.
    """
    csv.field_size_limit(ROW_BYTES)

    def read_bounded_lines() -> Iterator[str]:
        while line := text.readline(ROW_BYTES):
            if len(line) == ROW_BYTES and not line.endswith("\n"):
                raise DatasetError(f"{source.path}: has a line of over {ROW_BYTES:,} characters. Is it a table?")
            yield line

    text = io.TextIOWrapper(file, encoding=find_encoding(source, file), newline="")
    try:
        delimiter, skip_spaces, has_sep_line = _find_dialect(source, text, usual)
        text.seek(0)
        if has_sep_line:
            text.readline()  # which a spreadsheet does not show
        yield from _read_table(source, _open_reader(source.csv, delimiter, read_bounded_lines(), skip_spaces))
    finally:
        text.detach()


def _find_dialect(source: SourceFile, text: IO[str], usual: str) -> tuple[str, bool, bool]:
    """The delimiter, whether a space follows each one, and whether a sep= line stands before the header."""
    sample, configured = text.read(SAMPLE_CHARACTERS), source.csv.delimiter
    is_cut = len(sample) == SAMPLE_CHARACTERS
    sep = _SEP_LINE.match(sample)
    table = sample[sep.end() :] if sep else sample
    delimiter = configured or (sep[1] if sep else None) or _find_delimiter(source, table, is_cut, usual)
    if sep and configured is None:
        source.add_remark(f"its first line sets the delimiter {_describe_delimiter(sep[1])}")
    elif delimiter != usual and configured is None:
        source.add_remark(f"its delimiter is {_describe_delimiter(delimiter)}")
    header = next((row for row in _read_sample_rows(source, delimiter, table) if any(row)), [])
    spaced = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    if spaced and delimiter != " ":
        source.add_remark("a space follows each delimiter of its first row; spaces before cells are set aside")
    return delimiter, spaced, sep is not None


def _describe_delimiter(delimiter: str) -> str:
    return f"{delimiter!r} ({NAMES[delimiter]})" if delimiter in NAMES else repr(delimiter)


@dataclass(frozen=True)
class _Candidate:
    """A possible delimiter, the header that it gives, and the share of other rows with as many cells."""

    delimiter: str
    header: list[str]
    fitting: float

    @property
    def known_names(self) -> int:
        return sum(name.strip().lower() in FIELD_NAMES for name in self.header)


def _find_delimiter(source: SourceFile, table: str, is_cut: bool, usual: str) -> str:
    """The delimiter with which most rows have as many cells as the header.

    Ties go to the one with the most known field names in the header; that several remain is an error.
    """
    found = [c for d in DELIMITERS if (c := _try_delimiter(source, table, is_cut, d)) is not None]
    best = max((candidate.fitting for candidate in found), default=0.0)
    found = [candidate for candidate in found if candidate.fitting >= best - CLEARLY]
    names = max((candidate.known_names for candidate in found), default=0)
    found = [candidate for candidate in found if candidate.known_names == names]
    if len(found) > 1:
        ways = " or ".join(
            f"{_describe_delimiter(c.delimiter)} ({len(c.header)} columns, the first named '{c.header[0]}')"
            for c in found
        )
        raise DatasetError(
            f"{source.path}: its delimiter could be {ways}. Say which: data.csv.delimiter={NAMES[found[0].delimiter]}."
        )
    return found[0].delimiter if found else usual


def _try_delimiter(source: SourceFile, table: str, is_cut: bool, delimiter: str) -> _Candidate | None:
    if delimiter in (source.csv.quotechar, source.csv.escapechar):
        return None
    rows = list(islice(_read_sample_rows(source, delimiter, table), SAMPLE_ROWS))
    if is_cut and len(rows) < SAMPLE_ROWS:
        rows = rows[:-1]  # the last one's end is missing
    rows = [row for row in rows if any(row)]
    if not rows or len(rows[0]) < 2:
        return None
    others = rows[1:]
    fitting = sum(len(row) == len(rows[0]) for row in others) / len(others) if others else 1.0
    return _Candidate(delimiter, rows[0], fitting)


def _read_sample_rows(source: SourceFile, delimiter: str, table: str) -> Iterator[list[str]]:
    """The rows of a sample; a broken row counts as one cell."""
    reader = _open_reader(source.csv, delimiter, io.StringIO(table, newline=""))
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield ["broken"]


def _read_table(source: SourceFile, table: Any) -> Iterator[Row]:
    rows = _number_rows(source, table)
    names = next((cells for _, cells in rows if any(cells)), [])
    columns = _name_columns(source, names)
    width, empty, longer = len(columns), 0, 0
    for number, cells in rows:
        if not any(cells):
            empty += bool(cells)
            continue
        if len(cells) > width and not any(cells[width:]):
            cells, longer = cells[:width], longer + 1
        if len(cells) == width:
            yield from _build_rows(source, number, columns, cells)
        else:
            source.refuse_row(
                number,
                f"has {len(cells)} cells, the first row names {width} columns. Put text that holds the delimiter or a "
                'line break in "double quotes"; data.csv.delimiter and data.csv.quotechar set others.',
                kind="another number of cells",
            )
    if empty:
        source.add_remark(f"rows of nothing but empty cells are set aside: {empty}")
    if longer:
        source.add_remark(f"empty cells behind the last named column are set aside in rows: {longer}")


def _number_rows(source: SourceFile, table: Any) -> Iterator[tuple[int, list[str]]]:
    """Row numbers, from 1, and cells."""
    number = 0
    while True:
        number, before = number + 1, table.line_num
        try:
            yield number, next(table)
        except StopIteration:
            return
        except csv.Error as error:
            _refuse_broken_row(source, number, table.line_num - before, error)


def _refuse_broken_row(source: SourceFile, number: int, lines: int, error: csv.Error) -> None:
    advice = (
        'Within quoted text a quotation mark is written twice (""); where this table writes \\" for it, set '
        "data.csv.escapechar=backslash; where its quotation marks stand for themselves, set data.csv.quotechar=null."
    )
    if lines > 1 or number == 1:  # skipping it would also lose the rows inside the quotes
        raise DatasetError(
            f"{source.path}, row {number}: broken table ({error}): quoted text that begins there does not end as such "
            f"within {lines} lines. {advice}"
        )
    source.refuse_row(number, f"broken table ({error}). {advice}", kind="broken table")


def _name_columns(source: SourceFile, names: list[str]) -> list[str | None]:
    """The column names; None for a column without a name, which is ignored."""
    if len(names) > KEYS:
        raise DatasetError(f"{source.path}: its first row names {len(names):,} columns; {KEYS:,} can be read.")
    repeated = next((name for name, count in Counter(names).items() if count > 1 and name.strip()), None)
    if repeated is not None:
        raise DatasetError(
            f"{source.path}: two columns are named '{repeated}'. The first row must name each column once."
        )
    columns = [name if name.strip() else None for name in names]
    if names and columns[0] is None:
        source.add_remark("its first column has no name, as an index has none; it is set aside (to use it, name it)")
    if names and not any(columns):
        raise DatasetError(f"{source.path}: its first row is empty. It must name each column.")
    return columns


def _build_rows(source: SourceFile, number: int, columns: list[str | None], cells: list[str]) -> Iterator[Row]:
    if None not in columns:
        yield source.build_row(number, dict(zip(columns, cells, strict=True)))  # type: ignore[arg-type]
        return
    unnamed = next((i for i, name in enumerate(columns) if name is None and i and cells[i]), None)
    if unnamed is None:
        yield source.build_row(number, {n: cell for n, cell in zip(columns, cells, strict=True) if n is not None})
    else:
        source.refuse_row(
            number,
            f"has {cells[unnamed][:40]!r} in column {unnamed + 1}, which has no name. Name it in the first row, or "
            "take the text out.",
            kind="text in a column without a name",
        )
