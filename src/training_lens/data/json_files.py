"""JSON files to rows. The content decides how a file is read, not its suffix .json or .jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from training_lens.data.examples import Row, SourceFile
from training_lens.data.row_keys import FIELD_NAMES, plain_name
from training_lens.errors import DatasetError
from training_lens.utils.limits import EMPTY_LINES, NESTED, ROW_BYTES, WHOLE_JSON_BYTES, is_too_deep

HEAD_BYTES = 1 << 16  # of the file's beginning, to tell JSON Lines from one JSON value
MESSAGES = "messages"  # the key for a row that is only a list of messages
MESSAGE_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
TOO_LONG = f"has over {ROW_BYTES:,} bytes. Cut it, or take it out: no model reads so long a row."
SAVE_AS_UTF8 = "Save the file as UTF-8, such as with: iconv -f CP1252 -t UTF-8 OLD > NEW."
_FILLED = re.compile(r"\S")


def read_json_rows(source: SourceFile, file: IO[bytes], is_named_lines: bool) -> Iterator[Row]:
    """The rows of a JSON file: JSON Lines, a list of rows, an object with one such list, or single objects.

    JSON Lines (`is_named_lines`: by the file's suffix) are streamed; anything else is read whole.

    Raises:
        DatasetError: broken JSON, no rows, or a bad row and bad rows are not skipped.
    """
    if has_json_lines(file, is_named_lines):
        if not is_named_lines:
            source.add_remark("holds a JSON value on each line (JSON Lines), whatever its name says; read line by line")
        return _read_lines(source, file)
    content = file.read(WHOLE_JSON_BYTES + 1)
    if len(content) > WHOLE_JSON_BYTES:
        raise DatasetError(
            f"{source.path}: has over {WHOLE_JSON_BYTES:,} bytes of JSON that is not one value a line, which would all "
            "be in memory. Write JSON Lines, such as with: jq -c '.[]' OLD > NEW.jsonl."
        )
    return _read_values(source, _decode_text(source, content), is_named_lines)


def has_json_lines(file: IO[bytes], is_named_lines: bool) -> bool:
    """Whether each line of the file is a JSON value: by its first lines, or by its name if those are broken."""
    lines, is_cut = _read_first_lines(file)
    if not lines or _is_json(lines[0]):
        return len(lines) > 1
    if _may_begin_json(b"".join(lines), is_cut):
        return False
    begins_later = lines[0].strip() in (b"[", b"{")
    return is_named_lines or (not begins_later and len(lines) > 1 and _is_json(lines[1]))


def _read_first_lines(file: IO[bytes]) -> tuple[list[bytes], bool]:
    """The first non-empty lines (at least two, if there are), and whether more may follow."""
    lines: list[bytes] = []
    size, reads, line = 0, 0, b""
    while (size < HEAD_BYTES or len(lines) < 2) and reads < EMPTY_LINES and (line := file.readline(ROW_BYTES)):
        reads += 1
        lines += [line.removeprefix(b"\xef\xbb\xbf")] if line.strip() else []
        size += len(line)
    file.seek(0)
    return lines, bool(line)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _may_begin_json(head: bytes, is_cut: bool) -> bool:
    """Whether this is JSON over several lines: one value, several, or the beginning of one if it is cut."""
    text = head.decode("utf-8", "replace")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg == "Extra data" or (is_cut and error.pos >= len(text.rstrip()))
    except (ValueError, RecursionError):
        return False
    return True


class _RepeatedKey(dict[str, Any]):
    """An object with a duplicate key, whose first value would be lost silently."""

    key: str


class _Decoder(json.JSONDecoder):
    """Decodes JSON and detects duplicate keys."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._build_object)
        self.has_repeated_keys = False

    def _build_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        self.has_repeated_keys = True
        repeated, seen = _RepeatedKey(found), set[str]()
        repeated.key = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        return repeated

    def find_repeated_key(self, value: Any) -> str | None:
        """A key that occurs twice in an object of the value."""
        if not self.has_repeated_keys:
            return None
        if isinstance(value, _RepeatedKey):
            return value.key
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return next((key for item in inside if (key := self.find_repeated_key(item)) is not None), None)


def _read_lines(source: SourceFile, file: IO[bytes]) -> Iterator[Row]:
    decoder = _Decoder()
    for number, raw in _read_filled_lines(source, file):
        try:
            value = decoder.decode(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            kind = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            source.refuse_row(number, _describe_line_error(error), kind=kind, unit="line")
            continue
        yield from _build_rows(source, number, value, decoder)


def _read_filled_lines(source: SourceFile, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of the non-empty lines. A line that is too long is refused and never held in memory."""
    number, empty = 0, 0
    while line := file.readline(ROW_BYTES):
        number += 1
        is_long = len(line) == ROW_BYTES and not line.endswith(b"\n")
        while is_long and (more := file.readline(ROW_BYTES)) and not more.endswith(b"\n"):
            pass
        if is_long:
            source.refuse_row(number, TOO_LONG, kind="is too long", unit="line")
        elif line.strip():
            empty = 0
            yield number, line
        elif (empty := empty + 1) > EMPTY_LINES:
            raise DatasetError(f"{source.path}, line {number}: over {EMPTY_LINES:,} empty lines. Take them out.")


def _describe_line_error(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = f"byte {error.object[error.start]:#04x} at column {error.start + 1}"
        return f"is not UTF-8 text ({byte}). {SAVE_AS_UTF8}"
    if isinstance(error, json.JSONDecodeError):
        return (
            f"broken JSON ({error.msg} at column {error.colno}). A file of JSON Lines holds one complete JSON object "
            "a line."
        )
    return f"JSON that cannot be read ({error})."  # numbers of thousands of digits, brackets without end


def _build_rows(source: SourceFile, number: int, value: Any, decoder: _Decoder) -> Iterator[Row]:
    """The value as a row: an object, or a list of messages."""
    if is_too_deep(value):
        source.refuse_row(number, f"{NESTED}. Take it out, or write what is inside as text.", kind="is nested too deep")
    elif (repeated := decoder.find_repeated_key(value)) is not None:
        source.refuse_row(number, f"the key '{repeated}' stands there twice. Keep one.")
    elif isinstance(value, dict):
        yield source.build_row(number, value)
    elif is_message_list(value):
        yield source.build_row(number, {MESSAGES: value})
    else:
        what = "an empty list" if value == [] else f"a {type(value).__name__}"
        source.refuse_row(number, f"is {what}, expected an object with fields, or a list of messages.")


def is_message_list(value: Any) -> bool:
    """Whether a value is a list of objects, the first of which has a role and content."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and any(keys <= value[0].keys() for keys in MESSAGE_KEYS)
        and all(isinstance(item, dict) for item in value)
    )


def _decode_text(source: SourceFile, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise DatasetError(
            f"{source.path}, line {line}: is not UTF-8 text (byte {content[error.start]:#04x} at column {column}). "
            f"{SAVE_AS_UTF8}"
        ) from error


def _read_values(source: SourceFile, text: str, is_named_lines: bool) -> Iterator[Row]:
    decoder = _Decoder()
    values = _parse_values(source, text, decoder)
    if len(values) == 1:
        values = _find_rows(source, values[0], is_named_lines)
    elif values:
        source.add_remark(f"holds {len(values)} JSON values one after the other; each is a row")
    for number, value in enumerate(values, 1):
        yield from _build_rows(source, number, value, decoder)


def _parse_values(source: SourceFile, text: str, decoder: _Decoder) -> list[Any]:
    """All consecutive JSON values in the text."""
    values: list[Any] = []
    end = 0
    try:
        while start := _FILLED.search(text, end):
            value, end = decoder.raw_decode(text, start.start())
            values.append(value)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{source.path}, line {error.lineno}: broken JSON ({error.msg} at column {error.colno}). Expected one list "
            "of objects, or one complete object on each line. Fix it there: only in a file with one object on each "
            "line can data.on_bad_row=skip leave out what is broken."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{source.path}: JSON that cannot be read ({error}).") from error
    return values


def _find_rows(source: SourceFile, value: Any, is_named_lines: bool) -> list[Any]:
    """The rows in a file of one value."""
    if isinstance(value, dict):
        return _find_rows_in_object(source, value, is_named_lines)
    if not isinstance(value, list):
        raise DatasetError(
            f"{source.path}: holds a single {type(value).__name__}, expected a list of objects, or one object a line."
        )
    if is_message_list(value):
        source.add_remark("holds one list of messages, which is taken as one row")
        return [value]
    if is_named_lines:
        source.add_remark("holds one JSON list, not a row on each line as its name says; read whole")
    return value


def _find_rows_in_object(source: SourceFile, value: dict[str, Any], is_named_lines: bool) -> list[Any]:
    """The rows in the only list of an object (`{"examples": [...]}`); otherwise the object is a row."""
    lists = [key for key, item in value.items() if _holds_rows(item)]
    is_row = _is_row(value) or (not lists and not all(isinstance(item, list | dict) for item in value.values()))
    if not is_row and len(lists) == 1:
        others = ", ".join(f"'{other}'" for other in value if other != lists[0])
        source.add_remark(f"its rows are those of '{lists[0]}'{f'; not used: {others}' if others else ''}")
        return list(value[lists[0]])
    if is_named_lines or is_row:
        if not is_named_lines:
            source.add_remark("holds one object, which is taken as one row")
        return [value]
    if len(lists) > 1:
        problem = f"{len(lists)} lists of rows ({', '.join(lists)}). Write each into a file of its own."
        raise DatasetError(f"{source.path}: holds an object with {problem}")
    if not value:
        raise DatasetError(f"{source.path}: holds an empty object, expected a list of rows.")
    named = ", ".join(list(value)[:6]) + (" and more" if len(value) > 6 else "")
    raise DatasetError(
        f"{source.path}: holds an object of columns or of objects by name ({named}), not rows. Write a list of "
        "objects, one for each row; with pandas: to_json(FILE, orient='records', lines=True)."
    )


def _is_row(value: dict[str, Any]) -> bool:
    """Whether an object is a row itself: it has a chat, or a known field with text or a number."""
    return any(
        is_message_list(item) or (isinstance(item, str | int | float) and plain_name(key) in FIELD_NAMES)
        for key, item in value.items()
    )


def _holds_rows(item: Any) -> bool:
    is_list = isinstance(item, list) and not is_message_list(item)
    return is_list and any(isinstance(row, dict) or is_message_list(row) for row in item)
