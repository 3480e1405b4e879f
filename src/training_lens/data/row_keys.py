"""The known keys of rows, messages, calls and content parts, and the handling of any other key.

A key is read, refused (it cannot be honoured), or counted and reported as unused. A key that looks like a misspelling
of a missing one is refused: its content would be lost. `data.ignore_keys` ignores a key explicitly.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training_lens.data.notes import DataNotes
from training_lens.errors import DatasetError

# Common names of each field. If a file has two names of one line, the user must choose.
ALIASES: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "question", "prompt", "query", "problem"),
    "input": ("input", "context"),
    "output": ("output", "answer", "response", "completion", "solution"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history", "chat_history", "conversation_history"),
    "messages": ("messages", "conversations", "conversation"),
    "tools": ("tools", "functions"),
    "label": ("label", "kto_tag"),
    "text": ("text",),
}
FIELD_NAMES = frozenset(name for names in ALIASES.values() for name in names)
# Used only if a row has none of the names above: they have other meanings, too.
FALLBACKS: dict[str, tuple[str, ...]] = {"output": ("answers", "chosen"), "messages": ("chosen",)}
REJECTED = "rejected"  # next to `chosen`: the answer that is not learned
# Loss masks of a message or of the whole row.
MASKS = ("train", "training", "trainable", "loss", "loss_mask", "weight", "loss_weight")
# Words in names of keys that may be loss masks under another name.
MASK_WORDS = frozenset("train trained learn learned loss mask masked weight supervise supervised".split())
# The forms of rows and the meanings of each; LEADING is the meaning that selects the form.
MEANINGS: dict[str, tuple[str, ...]] = {
    "messages": ("system", "history", "messages", "tools", "output", "label"),
    "pair": ("system", "history", "instruction", "input", "tools", "output", "label"),
    "text": ("text",),
}
LEADING = {"messages": "messages", "pair": "instruction", "text": "text"}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thoughts", "chain_of_thought")
# Fields that often hold a domain: suggested if none is set.
DOMAIN_KEYS = ("hash", "domain_hash", "hash_id", "domain_id", "domain_name", "topic", "category", "subject", "task")

SHOWN = 60  # characters of an example
EMPTY_VALUES: tuple[Any, ...] = (None, "", [], {})
NO_MEDIA = "holds more than text, and only text can be trained on"
THOUGHTS_APART = (
    "stands apart from the answer and would not be learned. Put it into the answer as <think>...</think> and set "
    "data.thinking=true"
)
LIKE_A_MASK = (
    "looks like a loss mask, and is none of the names that are read as one ("
    f"{', '.join(MASKS)}; 0 or false: not learned). Rename it"
)
PARTS_MASKED = "marks parts of an answer, which is learned whole or not at all. Mark the whole turn with 'train'"
TOOLS_APART = "describes tools in a message. Put them into the row's own field 'tools'"
NOT_WITH_TEXT = "cannot be used beside plain text, which no template touches. Name the fields of a chat or of a pair"


@dataclass(frozen=True, eq=False)
class KeySchema:
    """The keys of one kind of object: groups of synonyms, and refused keys with the reason."""

    groups: tuple[tuple[str, ...], ...]
    refused: Mapping[str, str]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for group in self.groups for name in group)


_REFUSED = {**dict.fromkeys(MEDIA, NO_MEDIA), **dict.fromkeys(THOUGHTS, THOUGHTS_APART)}
MESSAGE = KeySchema(
    (
        *(("role", "from"), ("content", "value")),
        *(("name",), ("tool_call_id",), ("tool_calls",), ("function_call",)),
        *((mask,) for mask in MASKS),
    ),
    {**_REFUSED, "train_detail": PARTS_MASKED, **dict.fromkeys(ALIASES["tools"], TOOLS_APART)},
)
CALL = KeySchema((("id",), ("type",), ("function",), ("name",), ("arguments", "parameters")), {})
FUNCTION = KeySchema((("id",), ("type",), ("name",), ("arguments", "parameters")), {})
PART = KeySchema((("type",), ("text", "value")), {})


def row_schema(form: str, mapped: Mapping[str, str], used: Collection[str]) -> KeySchema:
    """The keys of a source's rows: `mapped` (meaning -> key), and others that are `used`."""
    groups = [(mapped[m].split(".")[0],) if m in mapped else ALIASES[m] for m in MEANINGS[form]]
    refused = {key: why for key, why in _REFUSED.items() if key not in {*mapped.values(), *used}}
    if form == "text":
        refused |= {name: NOT_WITH_TEXT for meaning in ("system", "history", "tools") for name in ALIASES[meaning]}
    return KeySchema((*groups, *((key,) for key in (*MASKS, *used))), refused)


@dataclass(frozen=True, slots=True)
class KeyShape:
    """The check's result for objects with the same keys.

    `masks` are the loss masks among the keys; `unread` are the keys that are not read, each with its problem ("" if it
    is only unused), and whether it is named like a mask.
    """

    masks: tuple[str, ...]
    unread: tuple[tuple[str, str, bool], ...]


class KeyCheck:
    """Accounts for every key of a source's rows. Objects with the same keys are examined once.

    `ignored` are paths of keys that the user ignores, such as 'meta' or 'messages[].emotion'.
    """

    def __init__(self, source: str, notes: DataNotes, ignored: Collection[str] = ()) -> None:
        self._source, self._notes, self._ignored = source, notes, frozenset(ignored)
        self._shapes: dict[tuple[KeySchema, str, tuple[str, ...]], KeyShape] = {}
        self._examples: dict[str, str] = {}

    def check_keys(self, place: str, level: KeySchema, values: Mapping[str, Any], path: str = "") -> KeyShape:
        """Check that no key of `values` is lost silently.

        Args:
            place: location of the object in error messages.
            path: path of its keys, such as 'messages[].'.

        Raises:
            DatasetError: a refused or misspelt key.
        """
        kind = (level, path, tuple(values))
        shape = self._shapes.get(kind)
        if shape is None:
            masks = tuple(key for key in values if key in MASKS and path + key not in self._ignored)
            unknown = [key for key in values if key not in level.names or path + key in self._ignored]
            unread = tuple(
                (key, self._find_problem(level, values, path, key), self._is_named_like_mask(key, path))
                for key in unknown
            )
            shape = self._shapes[kind] = KeyShape(masks, unread)
        for key, problem, is_named_like_mask in shape.unread:
            value = values[key]
            if is_named_like_mask and not problem and _holds_flags(value):
                problem = LIKE_A_MASK
            if problem and value not in EMPTY_VALUES:
                raise DatasetError(f"{place}: '{key}' {problem}. To train without it: {ignore_option(path + key)}.")
            if value is not None:
                self._notes.ignore_key(self._source, path + key)
        return shape

    def add_remark(self, sentence: str, example: str | None = None) -> None:
        """Add a remark on the source, once, with the first example."""
        if example is not None and sentence not in self._examples:
            shown = example if len(example) <= SHOWN else f"{example[:SHOWN]}..."
            self._examples[sentence] = f"{sentence}, such as {shown}"
        self._notes.add_remark(self._source, self._examples.get(sentence, sentence))

    def count_unused(self, path: str) -> None:
        """Count a known key that is unused here."""
        self._notes.ignore_key(self._source, path)

    def _find_problem(self, level: KeySchema, values: Mapping[str, Any], path: str, key: str) -> str:
        if path + key in self._ignored:
            return ""
        if key in level.refused:
            return level.refused[key]
        meant = misspelt_name(key, level.groups, values)
        return f"is not read, and '{meant}' is missing. Did you mean '{meant}'? Rename it" if meant else ""

    def _is_named_like_mask(self, key: str, path: str) -> bool:
        words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(key)).lower()))
        is_named = bool(words & MASK_WORDS) or (bool(path) and "label" in words)
        return is_named and path + key not in self._ignored


def _holds_flags(value: Any) -> bool:
    """Whether a value is true or false, 1 or 0, or a list of them."""
    flags = value if isinstance(value, list) and value else [value]
    return all(isinstance(flag, int | float) and flag in (0, 1) for flag in flags)


def ignore_option(path: str) -> str:
    """The command-line option that ignores a key."""
    return f"data.ignore_keys={path}" if path.isidentifier() else f"'data.ignore_keys=[\"{path}\"]'"


def misspelt_name(key: str, groups: Sequence[Sequence[str]], present: Collection[str]) -> str | None:
    """The name that `key` probably misspells, among the missing groups; None if there is none."""
    missing = (name for group in groups if not any(name in present for name in group) for name in group)
    return next((name for name in missing if is_near(key, name)), None)


def is_near(found: str, name: str) -> bool:
    """Whether `found` is `name` with at most one typo (two from eight letters on), ignoring case."""
    found, name = plain_name(found), plain_name(name)
    slips = 0 if len(name) < 4 else 1 if len(name) < 8 else 2
    is_close = abs(len(found) - len(name)) <= slips and len(set(found) ^ set(name)) <= 2 * slips  # a typo changes two
    return is_close and _edit_distance(found, name) <= slips


def plain_name(key: object) -> str:
    """A key in lower case, stripped, with '_' between words: 'System Prompt' -> 'system_prompt'."""
    return str(key).strip().casefold().replace(" ", "_").replace("-", "_")


def _edit_distance(a: str, b: str) -> int:
    """Optimal string alignment distance: substitutions, insertions, deletions and swaps of neighbours."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        earlier, before, row = before, row, [i]
        for j, other in enumerate(b, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                best = min(best, earlier[j - 2] + 1)
            row.append(best)
    return row[-1]
