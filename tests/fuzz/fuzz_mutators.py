"""Changes to inputs: of bytes, of the values in JSON and YAML, of names. Each is drawn with a seed, and comes again."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**63, -(2**70), 10**400, 1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "\u202e",
        "../../outside",
        "/etc/passwd",
        "~",
        "${a}",
        "[bold]x[/]",
        "{{ 1 }}",
        "a" * 5000,
    ),
    *([], {}, [[]], [None], {"": ""}, [0] * 2000),
)


INSERTED = (b"\0", b"\xff\xfe", b'"', b"{", b"[", b"\n" * 9, b",", b"9" * 5000)


def deep(depth: int) -> Any:
    """Lists and objects in each other."""
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def hostile_value(draw: random.Random) -> Any:
    return deep(draw.choice((5, 90, 150, 250))) if draw.random() < 0.1 else draw.choice(HOSTILE)


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, double, insert or replace a stretch."""
    place, length = draw.randrange(len(content) + 1), draw.choice((1, 2, 8, 64, 512))
    before, stretch, after = content[:place], content[place : place + length], content[place + length :]
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: before + bytes(byte ^ (1 << draw.randrange(8)) for byte in stretch) + after,
        lambda: before + after,
        lambda: before,
        lambda: before + stretch * draw.choice((2, 3, 500)) + after,
        lambda: before + draw.choice(INSERTED) + stretch + after,
        lambda: before + draw.randbytes(length) + after,
    )
    return draw.choice(changes)()


def change_value(value: Any, draw: random.Random) -> Any:
    """Replace, drop, double or rename one thing somewhere inside of a value of JSON."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return hostile_value(draw)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        changed = [change_value(value[place], draw)] if draw.random() < 0.7 else draw.choice(([], [value[place]] * 2))
        return [*value[:place], *changed, *value[place + 1 :]]
    key = draw.choice(list(value))
    kind = draw.random()
    if kind < 0.65:
        return {**value, key: change_value(value[key], draw)}
    rest = {name: item for name, item in value.items() if name != key}
    return rest if kind < 0.8 else {**rest, str(hostile_value(draw))[:6000]: value[key]}


def change_json(content: bytes, draw: random.Random) -> bytes:
    """Change a value, or the bytes, of a JSON file."""
    if draw.random() < 0.3:
        return change_bytes(content, draw)
    text = json.dumps(change_value(json.loads(content), draw), indent=draw.choice((None, 2)))
    return text.encode()


def change_text(text: str, words: tuple[str, ...], draw: random.Random) -> str:
    """Put words of a language into a text, or take some of it away."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        place, length = draw.randrange(len(text) + 1), draw.choice((0, 0, 1, 10))
        text = text[:place] + draw.choice(words) * draw.choice((1, 1, 1, 300)) + text[place + length :]
    return text


def change_row(database: Path, draw: random.Random) -> None:
    """Another value in one cell of one of Optuna's tables."""
    with closing(sqlite3.connect(database)) as opened:
        tables = [name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = draw.choice(sorted(tables))
        columns = [column[1] for column in opened.execute(f"PRAGMA table_info({table})")]
        rows = [row for (row,) in opened.execute(f"SELECT rowid FROM {table}")]  # Optuna's own names
        value = hostile_value(draw)
        text = value if isinstance(value, str) and draw.random() < 0.3 else json.dumps(value)
        cell: Any = value if isinstance(value, float) else text.encode("utf-8", "replace").decode()
        with suppress(sqlite3.Error):  # it breaks a rule of the table
            opened.execute(
                f"UPDATE {table} SET {draw.choice(columns)} = ? WHERE rowid = ?",
                (cell, draw.choice(rows or [0])),
            )
            opened.commit()
