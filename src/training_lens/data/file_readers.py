"""Files to rows: JSON, JSON Lines, CSV, TSV, Parquet, each also gzipped. Every error names the file and the row."""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from training_lens.config.data_sections import CsvSection
from training_lens.data.examples import Row, SourceFile
from training_lens.errors import DatasetError
from training_lens.utils.arrow_rows import iterate_arrow_rows
from training_lens.utils.limits import MB, UnpackedFile, open_file

GZIP = ".gz"
FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
TABLES = {".csv": ",", ".tsv": "\t"}  # the delimiter that each suffix implies
# First bytes of formats that often have the wrong suffix.
SIGNATURES = {
    b"PAR1": "a Parquet file; end its name in .parquet",
    b"\x1f\x8b": "compressed with gzip; end its name in .gz, for example .jsonl.gz",
    b"PK\x03\x04": "a zip archive (or an Office file); unpack it, or save it as .csv",
}
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def detect_format(path: Path) -> str | None:
    """The format by a file's name, '.jsonl' also for 'rows.jsonl.gz'; None if it is not supported."""
    suffix = Path(path.stem).suffix if path.suffix.lower() == GZIP else path.suffix
    return suffix.lower() if suffix.lower() in FORMATS else None


def check_csv_settings(settings: CsvSection, files: Collection[str]) -> None:
    """Refuse CSV settings if no source is a table.

    Args:
        files: the names of all sources.

    Raises:
        DatasetError: names the settings.
    """
    changed = [f"data.csv.{name}" for name, value in settings if value != getattr(CsvSection(), name)]
    if changed and not any(detect_format(Path(file)) in TABLES for file in files):
        raise DatasetError(
            f"{', '.join(changed)}: applies to tables of text ({', '.join(TABLES)}), and none of "
            f"{', '.join(sorted(files))} is one. Remove the setting, or rename the table to end in .csv or .tsv."
        )


def read_file_rows(source: SourceFile) -> Iterator[Row]:
    """The rows of one file, in order. Everything is streamed, except JSON that is not JSON Lines.

    Raises:
        DatasetError: an unknown suffix, broken or binary content, an ambiguous table, or a bad row and bad rows are
            not skipped.
    """
    from training_lens.data.csv_files import read_csv_rows  # a missing file is reported without them
    from training_lens.data.json_files import read_json_rows

    path = source.path
    kind = detect_format(path)
    if kind is None:
        raise DatasetError(
            f"{path}: the ending '{''.join(path.suffixes[-2:])}' is not readable; expected {', '.join(FORMATS)}, "
            f"each also with {GZIP}."
        )
    try:
        opened = open_file(path)
        with io.BufferedReader(UnpackedFile(opened), MB) if path.suffix.lower() == GZIP else opened as file:
            _check_signature(path, file, kind)
            if kind == ".parquet":
                yield from _read_parquet_rows(source, file)
            elif kind in TABLES:
                yield from read_csv_rows(source, file, TABLES[kind])
            else:
                yield from read_json_rows(source, file, is_named_lines=kind != ".json")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: broken gzip data ({error}). Compress it again, or copy it again whole.") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _check_signature(path: Path, file: IO[bytes], kind: str) -> None:
    head = file.read(4096)
    file.seek(0)
    if kind == ".parquet":
        if not head.startswith(b"PAR1"):
            raise DatasetError(f"{path}: is no Parquet file. End its name as what it is: {', '.join(FORMATS)}.")
        return
    found = next((what for start, what in SIGNATURES.items() if head.startswith(start)), None)
    if found is None and kind in TABLES and head.lstrip().startswith((b'{"', b"[{")):
        found = "JSON; end its name in .json"
    elif found is None and kind not in TABLES and head.startswith(UTF16):  # only tables have their encoding detected
        found = "UTF-16 text, and JSON is UTF-8. Save it as UTF-8, or convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"
    elif found is None and kind not in TABLES and b"\0" in head:
        found = "binary, no text"
    if found:
        raise DatasetError(f"{path}: is {found}.")


def _read_parquet_rows(source: SourceFile, file: IO[bytes]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_packed = source.path.suffix.lower() == GZIP
    with tempfile.TemporaryFile() as unpacked:  # Parquet is read from its end, so gzip is unpacked first
        if is_packed:
            shutil.copyfileobj(file, unpacked, MB)
        try:
            table = pq.ParquetFile(unpacked if is_packed else source.path)
            for number, values in enumerate(iterate_arrow_rows(table.iter_batches(batch_size=1000)), 1):
                yield source.build_row(number, values)
        except (pa.ArrowException, KeyError) as error:  # a map that has a key twice
            raise DatasetError(f"{source.path}: broken Parquet ({error}). Write or copy it again.") from error
        except (ValueError, OverflowError) as error:  # dates before year 1, text that is no UTF-8
            raise DatasetError(
                f"{source.path}: holds a value that cannot be read ({error}). Write the file again without it, or that "
                "column as text."
            ) from error
