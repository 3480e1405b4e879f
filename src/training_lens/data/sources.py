"""Files to rows: JSON (a list, or an object that holds the list) and JSONL, by path or glob."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training_lens import embedded
from training_lens.data.types import Row
from training_lens.errors import DatasetError
from training_lens.utils.formatting import nearest

READABLE = (".json", ".jsonl")


def expand(specs: Sequence[str], key: str) -> list[Path]:
    """The files that paths, globs and embedded names mean, in the order given, each once.

    Raises:
        DatasetError: a path that is not there or a glob that matches nothing; names `key` and a near file.
    """
    files: dict[Path, None] = {}
    for spec in specs:
        if not spec.strip():
            raise DatasetError(f"{key}: an empty path; give a file.")
        path = Path(embedded.resolve(spec)).expanduser()
        if path.is_file():
            files[path] = None
        elif path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in READABLE)
            hint = (
                f" To take its {len(inside)} files: {key}='{spec.rstrip('/')}/*{inside[0].suffix}'." if inside else ""
            )
            raise DatasetError(f"{key}: '{spec}' is a folder, expected files (.json, .jsonl).{hint}")
        else:
            matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())  # noqa: PTH207 (absolute too)
            if not matches:
                raise DatasetError(f"{key}: {_missing(spec, path)}")
            files |= dict.fromkeys(matches)
    return list(files)


def _missing(spec: str, path: Path) -> str:
    if glob.has_magic(spec):
        return f"'{spec}' matches no file. Check the folder and the pattern; relative paths start at {Path.cwd()}."
    if spec.startswith(f"{embedded.MODEL}:"):
        return f"'{spec}' is not embedded; there are {embedded.TRAIN} and {embedded.HELDOUT}."
    if not path.parent.is_dir():
        return f"'{spec}' is not there: no folder '{path.parent}'. Relative paths start at {Path.cwd()}."
    close = nearest(path.name, [p.name for p in path.parent.iterdir()])
    hint = f" Did you mean '{path.parent / close}'?" if close else ""
    return f"'{spec}' is not there.{hint}"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, in order. JSONL is read a line at a time, JSON as a whole.

    Raises:
        DatasetError: broken JSON (with the line), not UTF-8, a row that is no object, an ending that is not known.
    """
    if path.suffix not in READABLE:
        raise DatasetError(f"{path}: the ending '{path.suffix}' is not readable; expected .json or .jsonl.")
    try:
        yield from _jsonl(path) if path.suffix == ".jsonl" else _json(path)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}).") from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(
                    f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno}). "
                    "A .jsonl file holds one complete JSON object a line; a list of objects goes into a .json file."
                ) from error
            yield _row(path, number, value)


def _json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}, line {error.lineno}: broken JSON ({error.msg} at column {error.colno}). "
            "A .json file holds one list of objects; one object a line goes into a .jsonl file."
        ) from error
    for number, item in enumerate(_the_list(path, value), 1):
        yield _row(path, number, item)


def _the_list(path: Path, value: Any) -> list[Any]:
    """The list itself, or the one list of objects that an object holds (`{"data": [...]}`)."""
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
