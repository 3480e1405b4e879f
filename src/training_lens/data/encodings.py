"""Detect the encoding of a text table from its bytes. An uncertain encoding is reported or refused."""

from __future__ import annotations

import codecs
import re
from typing import IO

from training_lens.data.examples import SourceFile
from training_lens.errors import DatasetError

BLOCK_BYTES = 1 << 20
HEAD_BYTES = 4096
BYTE_ORDER_MARKS = {  # those of UTF-32 begin as those of UTF-16 do
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SHOWN = 60  # characters of a line that an example shows
LINES = 1000  # non-ASCII lines that are checked for cp1252
UNLIKELY_SHARE = 0.1  # of non-ASCII letters
# What text in a Western European language hardly ever has, but other encodings read as cp1252 do: a capital behind a
# small letter, a sign within a word (but for quotes, dashes, (tm), degree, ...), and words of nothing but letters that
# are not ASCII.
_SIGNS_IN_WORDS = r"\u2018\u2019\u2013\u2014\u2026\u2122\xa0\xad\xae\xb0\xb7"
_UNLIKELY = re.compile(rf"(?<=[a-zß-ÿ])[À-ÞŠŽŸŒ]|(?<=\w)[^\w\s{_SIGNS_IN_WORDS}](?=\w)|[^\W\d_a-zA-Z]{{4,}}")
ENCODING_ADVICE = (
    "Save it as UTF-8, or say its encoding: data.csv.encoding=cp1252 (or cp1250, cp1251, mac_roman, shift_jis, "
    "gb18030, ...)."
)


def find_encoding(source: SourceFile, file: IO[bytes]) -> str:
    """The encoding of the file, as a name for `open`. Reads the whole file once.

    In order: the configured encoding, a byte order mark, UTF-16 by its zero bytes, UTF-8 if the whole file is valid,
    and cp1252 (Windows, Western Europe) if the text is plausible in it, which is reported with an example.

    Raises:
        DatasetError: the file is not in the configured encoding, or no encoding fits; names the line.
    """
    configured = source.csv.encoding
    if configured is not None:
        encoding = "utf-8-sig" if codecs.lookup(configured).name == "utf-8" else configured
        _require_encoding(source, file, encoding)
        return encoding
    head = file.read(HEAD_BYTES)
    file.seek(0)
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    wide = marked or _detect_utf16(head)
    if wide and wide != "utf-8-sig":
        source.add_remark(f"its text is {wide[:6].upper()}")
        _require_encoding(source, file, wide)
        return wide
    if b"\0" in head:
        raise DatasetError(f"{source.path}: is binary, or text in an encoding that cannot be told. {ENCODING_ADVICE}")
    return "utf-8-sig" if _find_bad_byte(file, "utf-8") is None else _find_legacy_encoding(source, file)


def _detect_utf16(head: bytes) -> str | None:
    """UTF-16 with its byte order, if every other byte is mostly zero."""
    pairs = len(head) // 2
    even, odd = head[0 : 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    if not pairs or max(even, odd) < 0.4 * pairs or min(even, odd) > 0.05 * pairs:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _find_bad_byte(file: IO[bytes], encoding: str) -> int | None:
    """The position of the first invalid byte, or None; seeks back to the start of the file."""
    decoder = codecs.getincrementaldecoder(encoding)()
    read = 0
    try:
        while True:
            block = file.read(BLOCK_BYTES)
            pending = len(decoder.getstate()[0])
            decoder.decode(block, final=not block)
            if not block:
                return None
            read += len(block)
    except UnicodeDecodeError as error:
        return max(0, read - pending + error.start)
    finally:
        file.seek(0)


def _require_encoding(source: SourceFile, file: IO[bytes], encoding: str) -> None:
    bad = _find_bad_byte(file, encoding)
    if bad is not None:
        line = file.read(bad).count(b"\n") + 1
        raise DatasetError(f"{source.path}, line {line}: is not {encoding} text. {ENCODING_ADVICE}")


def _find_legacy_encoding(source: SourceFile, file: IO[bytes]) -> str:
    """cp1252, if a file that is not UTF-8 is plausible in it."""
    utf8_line, lines = _sample_non_ascii_lines(file)
    first = next(iter(lines))
    if utf8_line:
        raise DatasetError(
            f"{source.path}: mixes encodings: line {utf8_line} is UTF-8, line {first} is not. Save all "
            "of it as UTF-8, or set the encoding to read it in: data.csv.encoding=cp1252."
        )
    if _find_bad_byte(file, "cp1252") is not None or not _looks_western(b"".join(lines.values()).decode("cp1252")):
        raise DatasetError(f"{source.path}, line {first}: is not UTF-8 text. {ENCODING_ADVICE}")
    text = lines[first].decode("cp1252")
    start = max(0, next(i for i, character in enumerate(text) if not character.isascii()) - SHOWN // 2)
    source.add_remark(
        f"is not UTF-8, and read as cp1252 (Windows, Western Europe): line {first} then says "
        f"{text[start : start + SHOWN].strip()!r}. If that is wrong, set data.csv.encoding"
    )
    return "cp1252"


def _sample_non_ascii_lines(file: IO[bytes]) -> tuple[int | None, dict[int, bytes]]:
    """Of the non-ASCII lines: the number of the first valid UTF-8 line, and the first `LINES` others by number."""
    utf8_line, lines = None, dict[int, bytes]()
    for number, line in enumerate(file, 1):
        if line.isascii():
            continue
        try:
            line.decode("utf-8")
            utf8_line = utf8_line or number
        except UnicodeDecodeError:
            if len(lines) < LINES:
                lines[number] = line
    file.seek(0)
    return utf8_line, lines


def _looks_western(text: str) -> bool:
    letters = sum(not character.isascii() for character in text)
    unlikely = sum(len(match[0]) for match in _UNLIKELY.finditer(text) if not match[0].isascii())
    return unlikely <= UNLIKELY_SHARE * letters
