"""The table of keys that rows, messages, calls and parts of content may have, and what becomes of any other key.

A key is read, or refused because it cannot be honoured, or counted and named as not used. A key that nearly spells
one that is missing is refused: what the user meant would be lost. `data.ignore_keys` sets a key aside by the user's
own word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training_lens.data.notes import DataNotes
from training_lens.errors import DatasetError

# What a field of a row is commonly called. Where a file has two names of one line, the user must say which is meant.
ALIASES: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "question", "prompt", "query", "problem"),
    "input": ("input", "context"),
    "output": ("output", "answer", "response", "completion", "solution"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "messages": ("messages", "conversations", "conversation"),
    "tools": ("tools", "functions"),
    "label": ("label", "kto_tag"),
    "text": ("text",),
}
# Taken where a row has none of the names above: they mean other things, too.
FALLBACKS: dict[str, tuple[str, ...]] = {"output": ("answers", "chosen"), "messages": ("chosen",)}
REJECTED = "rejected"  # beside `chosen`: the answer that is not to be learned
# Whether an answer is learned: on a message, or on the whole row.
MASKS = ("train", "training", "trainable", "loss", "loss_mask", "weight", "loss_weight")
# The forms that rows have, the meanings that each reads, and the one that chooses it.
MEANINGS: dict[str, tuple[str, ...]] = {
    "messages": ("system", "history", "messages", "tools", "output", "label"),
    "pair": ("system", "history", "instruction", "input", "tools", "output", "label"),
    "text": ("text",),
}
LEADING = {"messages": "messages", "pair": "instruction", "text": "text"}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Fields that often say where a row belongs: offered as domain where none is set.
DOMAIN_KEYS = ("hash", "domain_hash", "hash_id", "domain_id", "domain_name", "topic", "category", "subject", "task")

SHOWN = 60  # characters of an example
EMPTY_VALUES: tuple[Any, ...] = (None, "", [], {})
NO_MEDIA = "holds more than text, and only text can be trained on"
THOUGHTS_APART = (
    "stands apart from the answer and would not be learned. Put it into the answer as <think>...</think> and set "
    "data.thinking=true"
)
PARTS_MASKED = "marks parts of an answer, which is learned whole or not at all. Mark the whole turn with 'train'"
TOOLS_APART = "describes tools in a message. Put them into the row's own field 'tools'"
NOT_WITH_TEXT = "cannot be used beside plain text, which no template touches. Name the fields of a chat or of a pair"


@dataclass(frozen=True, eq=False)
class KeySchema:
    """The keys of one kind of object: groups of names for one thing, and keys that are refused, with the reason."""

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
    """The keys of a source's rows.

    Args:
        mapped: of each meaning that the rows have, its key.
        used: other keys that are read.
    """
    groups = [(mapped[m].split(".")[0],) if m in mapped else ALIASES[m] for m in MEANINGS[form]]
    refused = {key: why for key, why in _REFUSED.items() if key not in {*mapped.values(), *used}}
    if form == "text":
        refused |= {name: NOT_WITH_TEXT for meaning in ("system", "history", "tools") for name in ALIASES[meaning]}
    return KeySchema((*groups, *((key,) for key in (*MASKS, *used))), refused)


@dataclass(frozen=True, slots=True)
class KeyShape:
    """What is known of objects with the same keys.

    `masks` are those of their keys that say whether an answer is learned; `unread` is not read, each key with what is
    wrong with it ("" where it is only not used).
    """

    masks: tuple[str, ...]
    unread: tuple[tuple[str, str], ...]


class KeyCheck:
    """Accounts for every key of a source's rows; objects with the same keys are examined once.

    Args:
        source: the source's name.
        ignored: paths of keys that the user sets aside, such as 'meta' or 'messages[].emotion'.
    """

    def __init__(self, source: str, notes: DataNotes, ignored: Collection[str] = ()) -> None:
        self._source, self._notes, self._ignored = source, notes, frozenset(ignored)
        self._shapes: dict[tuple[KeySchema, str, tuple[str, ...]], KeyShape] = {}
        self._examples: dict[str, str] = {}

    def check_keys(self, place: str, level: KeySchema, values: Mapping[str, Any], path: str = "") -> KeyShape:
        """See that no key of `values` is lost in silence.

        Args:
            place: where they stand, for messages.
            path: where keys of this level stand, such as 'messages[].'.

        Raises:
            DatasetError: a key that is refused or misspelt.
        """
        kind = (level, path, tuple(values))
        shape = self._shapes.get(kind)
        if shape is None:
            shape = self._shapes[kind] = self._examine_keys(level, values, path)
        for key, problem in shape.unread:
            value = values[key]
            if problem and value not in EMPTY_VALUES:
                raise DatasetError(f"{place}: '{key}' {problem}. To train without it: {ignore_option(path + key)}.")
            if value is not None:
                self._notes.ignore_key(self._source, path + key)
        return shape

    def add_remark(self, sentence: str, example: str | None = None) -> None:
        """Tell the user something about the source, once, with the first example there is."""
        if example is not None and sentence not in self._examples:
            shown = example if len(example) <= SHOWN else f"{example[:SHOWN]}..."
            self._examples[sentence] = f"{sentence}, such as {shown}"
        self._notes.add_remark(self._source, self._examples.get(sentence, sentence))

    def count_unused(self, path: str) -> None:
        """Count a key that is known, and not used here."""
        self._notes.ignore_key(self._source, path)

    def _examine_keys(self, level: KeySchema, values: Mapping[str, Any], path: str) -> KeyShape:
        masks = tuple(key for key in values if key in MASKS and path + key not in self._ignored)
        unknown = [key for key in values if key not in level.names or path + key in self._ignored]
        return KeyShape(masks, tuple((key, self._find_problem(level, values, path, key)) for key in unknown))

    def _find_problem(self, level: KeySchema, values: Mapping[str, Any], path: str, key: str) -> str:
        if path + key in self._ignored:
            return ""
        if key in level.refused:
            return level.refused[key]
        meant = misspelt_name(key, level.groups, values)
        return f"is not read, and '{meant}' is missing. Did you mean '{meant}'? Rename it" if meant else ""


def ignore_option(path: str) -> str:
    """How a user sets a key aside, as typed in a shell."""
    return f"data.ignore_keys={path}" if path.isidentifier() else f"'data.ignore_keys=[\"{path}\"]'"


def misspelt_name(key: str, groups: Sequence[Sequence[str]], present: Collection[str]) -> str | None:
    """The name that `key` nearly spells, of a group of which nothing is present; None where there is none."""
    missing = (name for group in groups if not any(name in present for name in group) for name in group)
    return next((name for name in missing if is_near(key, name)), None)


def is_near(found: str, name: str) -> bool:
    """Whether `found` is `name` with one slip of the keyboard (two in names of eight letters), or in other case."""
    found, name = plain_name(found), plain_name(name)
    slips = 0 if len(name) < 4 else 1 if len(name) < 8 else 2
    if abs(len(found) - len(name)) > slips or len(set(found) ^ set(name)) > 2 * slips:  # a slip changes two letters
        return False
    return _edit_distance(found, name) <= slips


def plain_name(key: object) -> str:
    """A key without case, spaces around it, and with '_' between its words: 'System Prompt' is 'system_prompt'."""
    return str(key).strip().casefold().replace(" ", "_").replace("-", "_")


def _edit_distance(a: str, b: str) -> int:
    """Letters to change, add, take out, or swap with their neighbour (optimal string alignment distance)."""
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
