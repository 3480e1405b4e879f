"""The overrides of a command line, `key=value`, as values: text as it is, all else in Hydra's grammar.

A key that takes text takes whatever the shell passes: spaces, brackets, `$`, digits. Special are only `null` where the
key may be null, quotes around the whole value, and `[a,b]` for keys that take a list; a file of that name takes
precedence. Objects may also be JSON.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from training_lens.config.keys import known_keys, nearest_key, section_model
from training_lens.config.schema import TrainingConfig
from training_lens.config.section import PATH_MARKER
from training_lens.errors import ConfigurationError
from training_lens.utils.limits import load_bounded_json
from training_lens.utils.names import expand_home

NO_SWEEP = "sweeps and deletions have no place here; give one value, lists as"
DATA_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz")
CONFIG_ENDINGS = (".yaml", ".yml")
PLAIN_VALUE = re.compile(r"true|false|-?(0|[1-9]\d{0,17})(\.\d+)?([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Override:
    """One word of the command line: a dotted key, the text behind its first '=', and the word as it was typed."""

    key: str
    raw: str
    word: str


@dataclass(frozen=True)
class KeyType:
    """The type of a key, as far as it decides how typed text is read.

    `form` is text, texts (a list of them, or one) or other (numbers, switches, mappings); `is_path`: it names files.
    """

    form: Literal["text", "texts", "other"]
    nullable: bool
    is_path: bool


def split_words(words: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides among the words, and a line for each other word, with what was most likely meant."""
    overrides, problems = [], []
    skipped = False
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        if skipped:  # reported together with the word before it
            skipped = False
            continue
        key, equals, raw = word.partition("=")
        if word.startswith("~") and equals == "":
            problems.append(f"'{word}': {NO_SWEEP} [a,b]")
        elif not equals or not is_key(key):
            skipped = takes_value(word, following)
            problems.append(describe_no_override(word, following if skipped else ""))
        elif any("\ud800" <= character <= "\udfff" for character in word):
            problems.append(f"{key}: the value is not UTF-8 text ({raw!r}); rename the file, or give another value")
        else:
            overrides.append(Override(key.lstrip("+"), raw, word))
    return overrides, problems


def is_key(text: str) -> bool:
    """Whether text has the form of a key: names separated by dots, after an optional '+' or two."""
    first = text.lstrip("+")[:1]
    return (first.isalpha() or first == "_") and not any(c.isspace() or c in "/\\'\"(),?!" for c in text.split(".")[0])


def takes_value(word: str, following: str) -> bool:
    """Whether the next word is the value of this one: `training.lr 1e-3`."""
    if word == "=" or not following or "=" in following or following.startswith("-"):
        return False
    known = known_keys(TrainingConfig)
    return following not in known and (word.strip("+-: ") in known or word.startswith("--"))


def describe_no_override(word: str, value: str = "") -> str:
    """Why a word is no override, and what was most likely meant; `value` is the next word, where it is this one's."""
    typed = f"{word} {value}".strip()
    name, _, given = word.lstrip("-").partition("=")
    name = name.strip(":")
    key = name if name in (known := known_keys(TrainingConfig)) else nearest_key(name, known)
    path = Path(word)
    hint = ", for example training.lr=1e-3"
    if word.endswith(DATA_ENDINGS) and _is_path(path):
        hint = f"; for rows to train on: data.train={word}"
    elif word.endswith(CONFIG_ENDINGS) and _is_path(path):
        hint = f"; for a config file: --config {word}"
    elif _is_path(path / "config.json"):
        hint = f"; for a model: model.id={word}"
    elif key and is_key(name):
        given = given or value or ("..." if "=" not in word else "")
        hint = f". Did you mean {key}={given}?"
    return f"'{typed}' is no override; write key=value{hint}"


def _is_path(path: Path) -> bool:
    """Whether a file or folder has this name; false for invalid names."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_value(override: Override) -> Any:
    """The value of the text behind the '='.

    Raises:
        ConfigurationError: a sweep, or several values where one is expected.
    """
    kind, raw = key_type(override.key), override.raw
    if kind.is_path and _is_path(expand_home(raw)):
        return raw
    if kind.nullable and raw.strip().lower() == "null":
        return None
    if kind.form == "text":
        return _strip_quotes(raw)
    if kind.form == "texts":
        return _read_texts(override, kind)
    return _read_other(override)


def _read_texts(override: Override, kind: KeyType) -> Any:
    """One text, or the list of `[a,b]`."""
    elements = split_list(override.raw)
    if elements is not None:
        return [_read_element(element) for element in elements]
    pieces = split_list(f"[{override.raw}]") or []
    are_files = all(_is_path(expand_home(piece)) for piece in pieces)
    if len(pieces) > 1 and (are_files or not kind.is_path) and not _is_quoted(override.raw):
        raise ConfigurationError(f"'{override.word}': {NO_SWEEP} {override.key}=[{','.join(pieces)}]")
    return _strip_quotes(override.raw)


def _read_element(text: str) -> Any:
    """An element of a list of texts: a text, or a row such as {question: a, answer: b}."""
    if text.startswith("{") and text.endswith("}") and not _is_path(Path(text)):
        value = _parse_hydra(text)
        return value if isinstance(value, dict) else text
    return _strip_quotes(text)


def _read_other(override: Override) -> Any:
    if PLAIN_VALUE.fullmatch(override.raw):  # as Hydra reads it, without importing Hydra
        return json.loads(override.raw)
    from hydra.core.override_parser.types import QuotedString

    parsed = _parse_override(override.raw)
    if parsed is None:  # not Hydra's grammar: JSON, a list element by element, anything else as text
        elements = split_list(override.raw)
        return _parse_object(override.raw) if elements is None else [_parse_hydra(element) for element in elements]
    if parsed.is_sweep_override():
        raise ConfigurationError(f"'{override.word}': {NO_SWEEP} [a,b]")
    value = parsed.value()
    return value.text if isinstance(value, QuotedString) else _unwrap_quoted(value)


def _parse_override(raw: str) -> Any:
    """Hydra's reading of a value; None where it does not parse."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={raw}")
    except (HydraException, ValueError, RecursionError):  # numbers of thousands of digits, brackets without end
        return None


def _parse_hydra(raw: str) -> Any:
    """A value by Hydra's grammar, or the text itself."""
    parsed = _parse_override(raw)
    return raw if parsed is None or parsed.is_sweep_override() else _unwrap_quoted(parsed.value())


def _parse_object(raw: str) -> Any:
    """The object that JSON text stands for, as {"q_proj": 8}, whose keys Hydra refuses; or the text itself."""
    try:
        value = load_bounded_json(raw)
    except ValueError:
        return raw
    return value if isinstance(value, dict) else raw


def _unwrap_quoted(value: Any) -> Any:
    """Hydra's quoted strings as plain ones, also inside lists and dicts."""
    if isinstance(value, list):
        return [_unwrap_quoted(v) for v in value]
    if isinstance(value, dict):
        return {str(_unwrap_quoted(k)): _unwrap_quoted(v) for k, v in value.items()}
    return value.text if hasattr(value, "text") else value


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def _strip_quotes(text: str) -> str:
    """Text without the quotes around the whole of it, by Hydra's rules; any other text as it is."""
    if not _is_quoted(text):
        return text
    value = _parse_hydra(text)
    return value if isinstance(value, str) else text


def split_list(text: str) -> list[str] | None:
    """The elements of `[a,b]` as written; None where the text is not such a list, as `[draft] rows.jsonl`.

    Commas in quotes, braces and inner brackets do not separate.

    Example:
        >>> split_list("[rows (1).jsonl, 'a,b.json']")
        ['rows (1).jsonl', "'a,b.json'"]
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    elements, depth, start = [], 0, 1
    for index, character in _unquoted_characters(text):
        depth += (character in "[{") - (character in "]}")
        if depth == 0 and index < len(text) - 1:
            return None  # the first bracket is closed before the end
        if (character == "," and depth == 1) or index == len(text) - 1:
            elements.append(text[start:index].strip())
            start = index + 1
    return None if depth else [] if elements == [""] else elements


def _unquoted_characters(text: str) -> Iterator[tuple[int, str]]:
    """The characters outside quotes, with their positions; quotes open only at the start of an element."""
    quote, at_start = "", True
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote and not _is_escaped(text, index) else quote
        elif at_start and character in "'\"" and character in text[index + 1 :]:
            quote = character
        else:
            yield index, character
            at_start = character in "[{,:" or (at_start and character == " ")
            continue
        at_start = False


def _is_escaped(text: str, index: int) -> bool:
    """Whether an odd number of backslashes stands before a character."""
    before = text[:index]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


@cache
def key_type(key: str) -> KeyType:
    """How typed text is read for a key; an unknown key is read by Hydra's grammar."""
    field = _find_field(TrainingConfig, key.split("."))
    if field is None:
        return KeyType("other", False, False)
    members = tuple(list_union_members(field.annotation))
    present = [member for member in members if member is not type(None)]
    form: Literal["text", "texts", "other"] = "other"
    if all(_takes_text(member) for member in present):
        form = "text"
    elif all(_takes_text(member) or get_origin(member) is list for member in present) and any(
        get_origin(member) is list and all(map(_takes_text, list_union_members(get_args(member)[0])))
        for member in present
    ):
        form = "texts"
    return KeyType(form, len(present) < len(members), _has_marker((field.annotation, field.metadata)))


def _find_field(model: type[BaseModel], path: Sequence[str]) -> FieldInfo | None:
    field = model.model_fields.get(path[0])
    if field is None or len(path) == 1:
        return field
    inner = section_model(field)
    return _find_field(inner, path[1:]) if inner else None


def list_union_members(annotation: Any) -> Iterator[Any]:
    """The member types of a union, without annotations."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from list_union_members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from list_union_members(member)
    else:
        yield annotation


def _takes_text(member: Any) -> bool:
    literal = get_origin(member) is Literal
    return member is str or (literal and all(isinstance(value, str) for value in get_args(member)))


def _has_marker(annotation: Any) -> bool:
    """Whether a type, or one inside it, is marked as a path."""
    if annotation is PATH_MARKER:
        return True
    inner = annotation if isinstance(annotation, list | tuple) else get_args(annotation)
    return any(_has_marker(part) for part in inner)


def read_values(overrides: Sequence[Override], report: Callable[[str], None]) -> tuple[dict[str, Any], list[str]]:
    """The values of overrides by dotted key, where the last one wins (`report` says so); a line for each unreadable."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for override in overrides:
        try:
            value = read_value(override)
        except ConfigurationError as error:
            problems += error.problems
            continue
        if override.key in values and values.pop(override.key) != value:
            report(f"{override.key} is given more than once; the last one holds: {override.word}")
        values[override.key] = value
    return values, problems
