"""Files to rows: JSON, JSONL, CSV, TSV, Parquet, each also gzipped. Every error names the file and the row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from training_lens.data.types import Row
from training_lens.errors import DatasetError

GZIP = ".gz"
FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# How files begin that are often misnamed; Unicode's byte order marks other than UTF-8's.
SIGNATURES = {
    b"PAR1": "a Parquet file; end its name in .parquet",
    b"\x1f\x8b": "compressed with gzip; end its name in .gz, for example .jsonl.gz",
    b"PK\x03\x04": "a zip archive (or an Office file); unpack it, or save it as .csv",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


def format_of(path: Path) -> str | None:
    """The format that a file's name says, '.jsonl' for 'rows.jsonl.gz' too; None where it is none that we read."""
    suffix = Path(path.stem).suffix if path.suffix == GZIP else path.suffix
    return suffix if suffix in FORMATS else None


OnBroken = Callable[[int, str], None]  # takes the number of a broken line, and what is wrong with it


def file_rows(path: Path, on_broken: OnBroken | None = None) -> Iterator[Row]:
    """The rows of one file, in order. Only a .json file is read as a whole.

    Args:
        on_broken: told of a broken line of JSONL, which is then passed over; None makes it an error.

    Raises:
        DatasetError: an ending that is not known, broken or binary content, a row that is no object, a duplicate key.
    """
    kind = format_of(path)
    if kind is None:
        raise DatasetError(
            f"{path}: the ending '{''.join(path.suffixes[-2:])}' is not readable; expected {', '.join(FORMATS)}, "
            f"each also with {GZIP}."
        )
    readers: dict[str, Callable[[Path, IO[bytes]], Iterator[Row]]] = {
        ".json": _json,
        ".jsonl": partial(_jsonl, on_broken=on_broken),
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }
    try:
        with _open(path) as file:
            _check_signature(path, file, kind)
            yield from readers[kind](path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: broken gzip data ({error}). Compress it again, or copy it again whole.") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == GZIP else path.open("rb")  # type: ignore[return-value]


def _check_signature(path: Path, file: IO[bytes], kind: str) -> None:
    head = file.read(4096)
    file.seek(0)
    if kind == ".parquet":
        if not head.startswith(b"PAR1"):
            raise DatasetError(f"{path}: is no Parquet file. End its name as what it is: {', '.join(FORMATS)}.")
        return
    found = next((what for start, what in SIGNATURES.items() if head.startswith(start)), None)
    if found is None and b"\0" in head:
        found = "binary, no text"
    if found:
        raise DatasetError(f"{path}: is {found}.")


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}, line {number}: is not UTF-8 text (byte {error.object[error.start]:#04x} at column "
            f"{error.start + 1}). Save the file as UTF-8."
        ) from error


class _DuplicateKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused where a key stands in it twice: the first value would be lost in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return found


def _jsonl(path: Path, file: IO[bytes], on_broken: OnBroken | None) -> Iterator[Row]:
    for number, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        try:
            yield _line(path, number, raw)
        except DatasetError as error:
            if on_broken is None:
                raise
            on_broken(number, str(error).split(": ", 1)[-1])


def _line(path: Path, number: int, raw: bytes) -> Row:
    try:
        value = json.loads(_decode(path, number, raw), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno}). "
            "A .jsonl file holds one complete JSON object a line; a list of objects goes into a .json file."
        ) from error
    except _DuplicateKeyError as error:
        raise DatasetError(f"{path}, row {number}: the key '{error}' stands there twice. Keep one.") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
        raise DatasetError(f"{path}, line {number}: JSON that cannot be read ({error}).") from error
    return _row(path, number, value)


def _json(path: Path, file: IO[bytes]) -> Iterator[Row]:
    try:
        value = json.loads(_decode(path, 1, file.read()), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}, line {error.lineno}: broken JSON ({error.msg} at column {error.colno}). "
            "A .json file holds one list of objects; one object a line goes into a .jsonl file."
        ) from error
    except _DuplicateKeyError as error:
        raise DatasetError(f"{path}: the key '{error}' stands twice in one object. Keep one.") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: JSON that cannot be read ({error}).") from error
    for number, item in enumerate(_the_list(path, value), 1):
        yield _row(path, number, item)


def _the_list(path: Path, value: Any) -> list[Any]:
    """The list itself, or the one list of objects that an object holds (`{"examples": [...]}`)."""
    if isinstance(value, list):
        return value
    lists = {k: v for k, v in value.items() if isinstance(v, list)} if isinstance(value, dict) else {}
    if len(lists) == 1:
        return next(iter(lists.values()))
    found = f"an object with {len(lists)} lists ({', '.join(lists)})" if lists else f"a single {type(value).__name__}"
    raise DatasetError(f"{path}: holds {found}, expected a list of objects, or an object that holds one such list.")


def _row(path: Path, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DatasetError(f"{path}, row {number}: is a {type(value).__name__}, expected an object with fields.")
    return Row(str(path), number, value)


def _csv(path: Path, file: IO[bytes]) -> Iterator[Row]:
    """Rows of a table whose first line names the columns; `number` is the row in a spreadsheet."""
    delimiter = "\t" if format_of(path) == ".tsv" else ","
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    table = csv.reader(text, delimiter=delimiter, strict=True)
    number = 1
    try:
        header = _header(path, next(table, []), delimiter)
        for number, cells in enumerate(table, 2):
            if not cells:
                continue
            if len(cells) != len(header):
                raise DatasetError(
                    f"{path}, row {number}: has {len(cells)} cells, the first row names {len(header)} columns. "
                    'Put text that holds the delimiter or a line break in "double quotes".'
                )
            yield Row(str(path), number, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DatasetError(f"{path}, row {number + 1}: broken table ({error}).") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}, after row {number}: is not UTF-8 text. Save the file as UTF-8.") from error
    finally:
        text.detach()


def _header(path: Path, names: list[str], delimiter: str) -> list[str]:
    if not names:
        return names
    other = next((d for d in (";", "\t", ",", "|") if d != delimiter and len(names) == 1 and d in names[0]), None)
    if other:
        advice = "end its name in .tsv" if other == "\t" else "save it with commas"
        raise DatasetError(f"{path}: its columns seem to be separated by {other!r}, not {delimiter!r}; {advice}.")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        what = f"two columns are named '{repeated}'" if repeated.strip() else "columns without a name"
        raise DatasetError(f"{path}: {what}. The first row must name each column once.")
    return names


def _parquet(path: Path, file: IO[bytes]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as unpacked:  # Parquet is read from its end: what is gzipped is unpacked first
        if path.suffix == GZIP:
            shutil.copyfileobj(file, unpacked)
        try:
            table = pq.ParquetFile(unpacked if path.suffix == GZIP else path)
            values = (value for batch in table.iter_batches(batch_size=1000) for value in batch.to_pylist())
            yield from (Row(str(path), number, value) for number, value in enumerate(values, 1))
        except pa.ArrowException as error:
            raise DatasetError(f"{path}: broken Parquet ({error}). Write or copy it again.") from error
