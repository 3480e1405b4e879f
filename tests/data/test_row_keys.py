"""No key of a row is lost in silence: it is read, or refused, or named as not used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training_lens.config.data_sections import DataSection
from training_lens.data.examples import Example, Row
from training_lens.data.fields import FieldMapping, collect_keys, find_mapping
from training_lens.data.notes import DataNotes
from training_lens.data.row_keys import (
    ALIASES,
    CALL,
    FALLBACKS,
    FUNCTION,
    MASKS,
    MEDIA,
    MESSAGE,
    PART,
    THOUGHTS,
    is_near,
    plain_name,
)
from training_lens.data.row_reader import RowReader
from training_lens.errors import DatasetError

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALLING = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Where is it?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"q": "owl"}}}],
        },
        {"role": "tool", "content": "in the oak", "tool_call_id": "c1", "name": "find"},
        {"role": "assistant", "content": "In the oak.", "train": True},
    ],
    "tools": [TOOL],
    "domain": "wood",
}
LEGACY = {
    "conversations": [
        {"from": "human", "value": "Where is it?"},
        {"from": "gpt", "value": "", "function_call": {"name": "find", "arguments": "{}"}, "loss_weight": 1},
    ],
    "functions": [TOOL["function"]],
    "system_prompt": "Be brief.",
}
PAIR = {
    "instruction": "Where is it?",
    "input": "the owl",
    "output": "In the oak.",
    "system": "Be brief.",
    "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    "weight": 1,
    "label": True,
}
RATED = {
    "prompt": [{"role": "user", "content": "Where is it?"}],
    "chosen": [{"role": "assistant", "content": "In the oak."}],
    "rejected": [{"role": "assistant", "content": "Nowhere."}],
}
XLAM = {"query": "Where is it?", "tools": [TOOL], "answers": [{"name": "find", "arguments": {"q": "owl"}}]}
ASKED = {"question": "a", "answer": "b"}
TEXT = {"text": "The owl lives in the wood."}
ROWS = (CALLING, LEGACY, PAIR, RATED, XLAM, TEXT)
# What belongs to the template or to the tool, and what is set aside as a whole.
OPEN = ("tools", "functions", "arguments", "parameters", "rejected")


def read(values: dict[str, Any], **data: Any) -> tuple[Example, FieldMapping, DataNotes]:
    section, row, notes = DataSection.model_validate(data), Row("f", 1, values), DataNotes()
    mapping = find_mapping(collect_keys([row]), section, "f")
    return RowReader(mapping, section, "f", notes).read_row(row), mapping, notes


def objects(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object inside a row of which the keys count, with the path of its keys."""
    if isinstance(value, list):
        for item in value:
            yield from objects(item, f"{path.removesuffix('.')}[].")
    elif isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            if key not in OPEN:
                yield from objects(inner, f"{path}{key}.")


def told_or_refused(values: dict[str, Any], key: str, path: str) -> None:
    """Reads a row of which one object has a key that it should not have."""
    try:
        example, mapping, notes = read(values)
    except DatasetError as error:
        assert str(error).startswith("f")
        return
    inside = {name for level in (MESSAGE, CALL, FUNCTION, PART) for name in level.names}
    is_read = plain_name(key) in inside if path else key in mapping.key_by_meaning.values()
    is_read = is_read or any(f'"{key}":' in message.text for message in example.messages)  # an answer in JSON
    assert is_read or path + key in notes.ignored_keys.get("f", {}), (mapping.describe(), notes.ignored_keys)


@given(data=st.data())
@settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
def test_an_unknown_key_at_any_depth_is_told_or_refused(data: st.DataObject) -> None:
    values = copy.deepcopy(data.draw(st.sampled_from(ROWS)))
    path, target = data.draw(st.sampled_from(list(objects(values))))
    key = data.draw(st.text(min_size=1, max_size=12))
    if key not in target:
        target[key] = data.draw(st.sampled_from(["x", 0, True, {"a": 1}, ["b"], 0.5]))
        told_or_refused(values, key, path)


@given(data=st.data())
@settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
def test_a_misspelt_key_at_any_depth_is_told_or_refused(data: st.DataObject) -> None:
    values = copy.deepcopy(data.draw(st.sampled_from(ROWS)))
    path, target = data.draw(st.sampled_from(list(objects(values))))
    name = data.draw(st.sampled_from(sorted(target)))
    key = slip(name, data)
    if key not in target and target[name] is not None:  # null holds nothing that could be lost
        target[key] = target.pop(name)
        told_or_refused(values, key, path)


def slip(name: str, data: st.DataObject) -> str:
    """The name with one slip of the keyboard."""
    at = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from("aeilnrst_X"))
    return data.draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
                name.upper(),
            ]
        )
    )


@pytest.mark.parametrize("row", ROWS)
def test_nothing_of_a_row_without_unknown_keys_is_named_as_unused(row: dict[str, Any]) -> None:
    _, _, notes = read(row)
    assert not notes.ignored_keys


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"question": "a", "answer": "b", "sytem": "x"},
            "row 1: 'sytem' is not read, and 'system' is missing. Did you",
        ),
        ({**ASKED, "Histroy": [["a", "b"]]}, "'Histroy' is not read, and 'history' is missing"),
        ({**ASKED, "domian": "x"}, "Did you mean 'domain'"),
        ({"mesages": []}, r"Is it 'mesages'\? Name it: data\.fields\.messages=mesages"),
        ({"question": "a", "anwser": "b"}, r"Is it 'anwser'\? Name it: data\.fields\.output=anwser"),
        (
            {"question": "a", "answer": "b", "images": ["c"]},
            r"only text can be trained on\. To train .*ignore_keys=images",
        ),
        ({**ASKED, "reasoning": "c"}, "'reasoning' stands apart from the answer"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "train_detail": [1]},
                ]
            },
            "'train_detail' marks parts of an answer",
        ),
        ({"text": "a", "system": "b"}, "'system' cannot be used beside plain text"),
        ({"text": "a", "loss": 2.31}, "'loss' is 2.31, expected 0 or 1"),
        *(
            (
                {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: value}]},
                message,
            )
            for key, value, message in [
                ("trained", False, "'trained' looks like a loss mask"),
                ("trainOnTurn", 0, "'trainOnTurn' looks like a loss mask"),
                ("label", True, r"'label' looks like a loss mask.*messages\[\]\.label"),
            ]
        ),
        ({**ASKED, "masked_turns": [0, 1]}, r"looks like a loss mask.*ignore_keys=masked_turns"),
    ],
)
def test_keys_that_cannot_be_honoured_are_refused_with_the_way_out(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(values)


def test_a_key_that_one_row_misspells_is_found_among_rows_that_have_it() -> None:
    rows = [
        Row("f", 1, {"question": "a", "answer": "b", "system": "c"}),
        Row("f", 2, {"question": "a", "answer": "b", "sytem": "c"}),
    ]
    section = DataSection()
    reader = RowReader(find_mapping(collect_keys(rows), section, "f"), section, "f")
    assert reader.read_row(rows[0]).messages[0].role == "system"
    with pytest.raises(DatasetError, match="f, row 2: 'sytem' is not read"):
        reader.read_row(rows[1])


def test_unknown_keys_are_counted_by_path_and_null_is_no_value() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}], "emotion": "glad"},
        {"role": "assistant", "content": "b", "emotion": None, "function_call": None, "refusal": None},
    ]
    section, notes = DataSection(), DataNotes()
    rows = [Row("f", i, {"messages": turns, "meta": {"score": 1}, "id": i}) for i in (1, 2)]
    reader = RowReader(find_mapping(collect_keys(rows), section, "f"), section, "f", notes)
    for row in rows:
        reader.read_row(row)
    assert notes.ignored_keys["f"] == {
        "meta": 2,
        "id": 2,
        "messages[].emotion": 2,
        "messages[].content[].cache_control": 2,
    }


def test_a_key_that_the_user_sets_aside_is_named_and_does_not_stop() -> None:
    values = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}],
        "loss": 7,
    }
    example, mapping, notes = read(values, ignore_keys=["messages[].weight", "loss"])
    assert example.messages[-1].learn and mapping.masks == ()
    assert notes.ignored_keys["f"] == {"messages[].weight": 1, "loss": 1}


def test_a_key_with_the_name_of_a_mask_and_another_kind_of_value_is_only_counted() -> None:
    _, _, notes = read({**ASKED, "train_id": 17, "learned_from": "a book", "unlabelled": False})
    assert notes.ignored_keys["f"] == {"train_id": 1, "learned_from": 1, "unlabelled": 1}


def test_a_hash_is_offered_as_domain_and_its_value_can_stand_alone() -> None:
    values = {"question": "a", "answer": "b", "hash": "3f2a"}
    _, _, notes = read(values)
    assert any("data.domain.field=hash" in said and "style=raw" in said for said in notes.remarks["f"])
    example, mapping, notes = read(values, domain={"field": "hash", "style": "raw"})
    assert example.domain == "3f2a" and not notes.ignored_keys and "domain from hash" in mapping.describe()


@pytest.mark.parametrize(
    ("found", "name", "near"),
    [
        ("sytem", "system", True),
        ("contnet", "content", True),
        ("Role", "role", True),
        ("too_calls", "tool_calls", True),
        ("insturctoin", "instruction", True),
        ("story", "history", False),
        ("id", "if", False),
        ("emotion", "content", False),
    ],
)
def test_near_are_names_of_one_slip(found: str, name: str, near: bool) -> None:
    assert is_near(found, name) is near


def test_no_known_name_is_taken_for_a_slip_of_another() -> None:
    for level in (MESSAGE, CALL, FUNCTION, PART):
        groups = [set(group) for group in level.groups]
        assert len(level.names) == sum(map(len, groups)) and not level.names & level.refused.keys()


def test_the_guide_names_every_key_that_the_table_has() -> None:
    guide = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    for meaning, names in ALIASES.items():
        fallback = f"; else {', '.join(FALLBACKS[meaning])}" if meaning in FALLBACKS else ""
        assert f"| `{meaning}` | {', '.join(names)}{fallback} |" in guide
    for what, level in (("a message", MESSAGE), ("a call", CALL), ("a part of content", PART)):
        names = [name for group in level.groups for name in group if name not in MASKS]
        assert f"| {what} | {', '.join(names)}" in guide
    assert f"| a mask | {', '.join(MASKS)} |" in guide
    assert f"media ({', '.join(MEDIA)})" in guide and f"({', '.join(THOUGHTS)})" in guide
    assert FUNCTION.names <= CALL.names
