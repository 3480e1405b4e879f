"""Every form that rows have in the field becomes the right messages, of which the right ones are learned."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from training_lens.config.data_sections import DataSection
from training_lens.data.examples import Example, Message, Row
from training_lens.data.fields import collect_keys, find_mapping
from training_lens.data.notes import DataNotes
from training_lens.data.row_reader import RowReader
from training_lens.data.source_reader import read_source_examples, read_usable_examples
from training_lens.data.sources import expand_sources
from training_lens.data.values import write_value
from training_lens.errors import DatasetError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
MORE = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
TOOL = {"name": "find_nest", "parameters": {"type": "object"}}
CASES = Path(__file__).parent / "cases"
CALL = {"name": "find_nest", "arguments": {"animal": "owl"}}


def read(values: dict[str, Any], **data: Any) -> tuple[Example, dict[str, int]]:
    """The example of a row, and what is said of its source."""
    section, row, notes = DataSection.model_validate(data), Row("f", 1, values), DataNotes()
    reader = RowReader(find_mapping(collect_keys([row]), section, "f"), section, "f", notes)
    return reader.read_row(row), notes.remarks.get("f", {})


def said(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in example.messages]


def learned(example: Example) -> list[str]:
    return [m.text for m in example.messages if m.role == "assistant" and m.learn]


# --- rows of users that once failed ----------------------------------------------------------------------------------


def first_of(name: str, **data: Any) -> tuple[Example, DataNotes]:
    path, notes = str(CASES / name), DataNotes()
    section = DataSection.model_validate({"train": [path], **data})
    examples = [
        e for source in expand_sources([path], "data.train") for e in read_usable_examples(source, section, notes)
    ]
    return examples[0], notes


def test_a_system_column_is_the_first_turn_of_a_chat() -> None:
    example, _ = first_of("01-sharegpt-system-column/a.json")
    assert said(example)[0] == ("system", "Always answer in capital letters.") and len(example.messages) == 3


def test_a_history_is_shown_and_learned_where_asked_for() -> None:
    example, notes = first_of("02-alpaca-history/a.json")
    assert [m.role for m in example.messages] == ["user", "assistant"] * 3
    assert learned(example) == ["The owl sleeps under the old bridge."]
    assert any("'history' are shown and not learned" in sentence for sentence in notes.remarks[example.file])
    every, _ = first_of("02-alpaca-history/a.json", supervise="all")
    assert len(learned(every)) == 3


@pytest.mark.parametrize("name", ["a_xlam", "b_query_response_tools", "d_legacy_function_call"])
def test_tools_are_shown_and_calls_are_calls(name: str) -> None:
    example, _ = first_of(f"03-pair-with-tools/{name}.jsonl")
    assert example.tools[0]["function"]["name"] == "find_nest"
    assert example.messages[1].calls == (CALL,) and example.messages[1].null_content


@pytest.mark.parametrize("name", ["train", "loss_mask", "weight_false"])
def test_turns_are_masked_by_every_name(name: str) -> None:
    example, _ = first_of(f"04-turn-mask-keys/{name}.jsonl")
    assert learned(example) == ["The owl eats berries."]


def test_rows_of_unwanted_answers_are_set_aside() -> None:
    path = str(CASES / "04-turn-mask-keys/row_label_false.jsonl")
    notes = DataNotes()
    examples = list(read_usable_examples(expand_sources([path], "data.train")[0], DataSection(train=[path]), notes))
    assert [bool(learned(e)) for e in examples] == [True, False] * 6
    assert any("'label' is false are set aside" in sentence for sentence in notes.remarks[path])


def test_prompts_and_completions_may_be_chats() -> None:
    example, _ = first_of("12-prompt-completion-messages/a.jsonl")
    assert [m.role for m in example.messages] == ["system", "user", "assistant"]
    rated, notes = first_of("12-prompt-completion-messages/c_preference.jsonl")
    assert learned(rated) == ["In the wood."]
    assert "'chosen' is learned, 'rejected' is set aside" in notes.remarks[rated.file]


def test_squad_and_json_answers() -> None:
    squad, _ = first_of("18-squad-nested-rtl/flat.jsonl")
    assert squad.messages[-1].text == "الغابة القديمة" and squad.messages[0].input
    answer, notes = first_of("24-json-answers/object.jsonl")
    assert answer.messages[-1].text == '{"animal":"owl","age":3}'
    assert any('such as {"animal":"owl","age":3}' in sentence for sentence in notes.remarks[answer.file])
    assert first_of("24-json-answers/bool.jsonl")[0].messages[-1].text == "true"


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": TURNS[:1], "completion": TURNS[1]},
        {"prompt": TURNS[:1], "completion": "b"},
        {"prompt": "a", "completion": TURNS[1:]},
        {"prompt": "a", "chosen": TURNS, "rejected": TURNS},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": TURNS, "rejected": TURNS},
        {
            "conversations": TURNS[:1],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        {"messages": json.dumps(TURNS)},
        {"messages": [TURNS]},
        {"messages": [{"Role": m["role"], "Content": m["content"]} for m in TURNS]},
        {"Question": "a", "ANSWER": "b"},
    ],
)
def test_these_rows_all_say_the_same(values: dict[str, Any]) -> None:
    example, _ = read(values)
    assert said(example) == [("user", "a"), ("assistant", "b")] and learned(example) == ["b"]


@pytest.mark.parametrize("history", [[["a", "b"]], TURNS, json.dumps([["a", "b"]])])
def test_earlier_turns_stand_before_the_row(history: Any) -> None:
    for values in ({"instruction": "c", "output": "d"}, {"messages": MORE}, {"prompt": MORE[:1], "completion": "d"}):
        example, _ = read({**values, "history": history, "system": "s"})
        assert [text for _, text in said(example)] == ["s", "a", "b", "c", "d"]
        assert learned(example) == ["d"]


@pytest.mark.parametrize(
    ("wrong", "what"), [(None, "null"), ("a", "a str"), (["a", "b", "c"], "a list"), (["a"], "a list")]
)
def test_a_history_of_anything_but_pairs_or_messages_is_refused(wrong: Any, what: str) -> None:
    with pytest.raises(DatasetError, match=rf"'history' holds {what}, expected pairs \[prompt, answer\]"):
        read({"question": "a", "answer": "b", "history": [["x", "y"], wrong]})


def test_a_prompt_that_is_a_chat_is_context() -> None:
    values = {"prompt": [*TURNS, MORE[0]], "completion": "d"}
    assert learned(read(values)[0]) == ["d"]
    assert learned(read(values, supervise="all")[0]) == ["b", "d"]


def test_one_system_message_may_stand_in_two_places_and_two_may_not() -> None:
    chat = [{"role": "system", "content": "s"}, *TURNS]
    assert len(read({"system": "s", "messages": chat})[0].messages) == 3
    with pytest.raises(DatasetError, match=r"own system message differ.*data\.ignore_keys=system"):
        read({"system": "t", "messages": chat})


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"name": "Zoë", "tags": []}, '{"name":"Zoë","tags":[]}'),
        (["a", 1, None], '["a",1,null]'),
        ([], "[]"),
        (True, "true"),
        (7, "7"),
        (3.0, "3.0"),
        (Decimal("1.50"), "1.50"),
        (datetime.date(2024, 2, 1), "2024-02-01"),
        (datetime.datetime(2024, 2, 1, 3, 4), "2024-02-01T03:04:00"),
        ({"day": datetime.date(2024, 2, 1)}, '{"day":"2024-02-01"}'),
        ([{"role": "CEO", "person": "Ann"}], '[{"role":"CEO","person":"Ann"}]'),
    ],
)
def test_answers_of_any_kind_are_written_one_way_and_said(answer: Any, text: str) -> None:
    example, remarks = read({"question": "a", "answer": answer})
    assert example.messages[-1].text == text == write_value(answer)
    assert any("learned as text" in sentence and sentence.endswith(text) for sentence in remarks)


@pytest.mark.parametrize("answer", [None, float("nan"), {"a": float("inf")}, b"bytes", " "])
def test_answers_that_say_nothing_are_refused(answer: Any) -> None:
    with pytest.raises(DatasetError, match="f, row 1: 'answer' is"):
        read({"question": "a", "answer": answer})


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"find": {"description": "x"}}, r"'tools' is a dict, expected a list of tools"),
        (
            [{"type": "function", "function": None}],
            "'tools' holds an object with function, type, expected descriptions",
        ),
        (
            [{"description": "Finds"}],
            "holds an object with description, expected descriptions of tools: objects with 'name'",
        ),
        ([["find"]], "holds a list, expected descriptions"),
        (["find"], "expected a tool description in JSON, found 'find'"),
    ],
)
def test_tools_of_odd_shapes_are_refused(tools: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read({"question": "a", "answer": "b", "tools": tools})


def test_an_answer_is_a_call_where_the_row_describes_its_tool() -> None:
    values = {"query": "a", "tools": [TOOL], "answers": [{"id": "c1", **CALL}, CALL]}
    example, remarks = read(values)
    assert [call.get("id") for call in example.messages[-1].calls] == ["c1", None]
    assert any("learned as calls" in sentence for sentence in remarks)
    other, _ = read({**values, "answers": [{"name": "other", "arguments": {}}]})
    assert not other.messages[-1].calls and other.messages[-1].text == '[{"name":"other","arguments":{}}]'


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"tool_calls": [CALL], "function_call": CALL}, "both 'tool_calls' and 'function_call'"),
        ({"tool_calls": [{"type": "custom", "name": "f"}]}, "a tool of type 'custom'"),
        ({"tool_calls": [{"function": {"name": "f", "args": {}}}]}, "has no 'arguments', but args"),
        ({"tool_calls": [{"name": "f", "arguments": {}, "parameters": {}}]}, "both 'arguments' and 'parameters'"),
        ({"tool_calls": {"name": "f"}}, "'tool_calls' is a dict, expected a list of calls"),
        ({"content": "x", "value": "y"}, "both 'content' and 'value'"),
        ({"content": "x", "train": True, "loss": 0}, "'train' is True and 'loss' is 0; they disagree"),
        ({"content": "x", "weight": 0.5}, r"'weight' is 0.5, expected 0 or 1.*messages\[\]\.weight"),
        ({"content": "x", "tools": [TOOL]}, "describes tools in a message"),
        ({"content": "x", "name": ["Alma"]}, "'name' is a list, expected text"),
    ],
)
def test_what_a_turn_says_twice_or_in_no_known_way_is_refused(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=rf"f, row 1, 'messages' message 2.*{message}"):
        read({"messages": [TURNS[0], {"role": "assistant", **turn}]})


@pytest.mark.parametrize("mask", ["train", "training", "trainable", "loss", "loss_mask", "weight", "loss_weight"])
@pytest.mark.parametrize("value", [False, 0, 0.0, "false", "0"])
def test_every_mask_masks_a_turn_and_a_row(mask: str, value: Any) -> None:
    turn, remarks = read({"messages": [*TURNS[:1], {**TURNS[1], mask: value}, *MORE]})
    assert learned(turn) == ["d"] and any(f"'{mask}' is 0" in sentence for sentence in remarks)
    for values in ({"messages": TURNS}, {"question": "a", "answer": "b"}, {"text": "b"}):
        assert learned(read({**values, mask: value})[0]) == []
        assert learned(read({**values, mask: True})[0]) == ["b"]


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({"loss_mask": [0, 1, 0, 0]}, ["b"]),
        ({"loss_mask": [0, 1]}, ["d"]),
        ({"loss_mask": [1, 1, 0, 1]}, "is 1 on a user message"),
        ({"loss_mask": [0, 1, 1]}, "has 3 entries for 4 messages with 2 answers"),
        ({"loss_mask": [0, 0.5]}, "'loss_mask' is 0.5"),
        ({"loss_mask": [0, 1], "train": True}, "each say what is learned"),
        ({"train": True, "loss": 0}, "they disagree"),
    ],
)
def test_masks_of_a_row_may_be_lists_of_turns(masks: dict[str, Any], expected: list[str] | str) -> None:
    values = {"messages": [*TURNS, *MORE], **masks}
    if isinstance(expected, list):
        assert learned(read(values)[0]) == expected
        return
    with pytest.raises(DatasetError, match=expected):
        read(values)


def test_a_list_of_masks_counts_the_rows_own_turns() -> None:
    values = {"messages": TURNS, "loss_mask": [0, 1], "system": "s", "history": [["x", "y"]]}
    assert learned(read(values)[0]) == ["b"]
    assert learned(read({**values, "loss_mask": [0, 0]}, supervise="all")[0]) == []


def test_masks_of_a_row_and_of_its_turns_may_not_disagree() -> None:
    marked = [TURNS[0], {**TURNS[1], "train": True}]
    with pytest.raises(DatasetError, match="'weight' and the masks of its messages disagree"):
        read({"messages": marked, "weight": 0})
    assert learned(read({"messages": marked, "weight": 1})[0]) == ["b"]


def test_a_label_masks_where_it_is_true_or_false_and_a_number_is_asked_about() -> None:
    values = {"prompt": "a", "completion": "b"}
    assert learned(read({**values, "label": "False"})[0]) == []
    assert learned(read({**values, "label": "positive"})[0]) == ["b"]
    with pytest.raises(DatasetError, match=r"data\.fields\.label=label; else: data\.ignore_keys=label"):
        read({**values, "label": 0})
    assert learned(read({**values, "label": 0}, fields={"label": "label"})[0]) == []


def test_a_dotted_field_leads_inside_and_tells_what_it_leaves() -> None:
    values = {"q": {"text": "a"}, "faq": {"items": [{"a": "b", "score": 1}, {"a": "c"}]}}
    fields = {"instruction": "q.text", "output": "faq.items.a"}
    example, remarks = read(values, fields=fields)
    assert said(example) == [("user", "a"), ("assistant", "b")]
    assert "of several items in 'faq.items' the first is read" in remarks


def test_a_field_that_the_form_cannot_use_is_an_error() -> None:
    with pytest.raises(DatasetError, match=r"data\.fields\.input cannot be used. The rows are read as chats"):
        read({"messages": TURNS, "context": "x"}, fields={"input": "context"})
    with pytest.raises(DatasetError, match="choose two forms"):
        read({"messages": TURNS, "text": "x"}, fields={"messages": "messages", "text": "text"})


def test_records_of_squad_become_a_row_for_each_question(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    def question(number: int, *answers: str) -> dict[str, Any]:
        marked = [{"text": text, "answer_start": 0} for text in answers]
        return {"id": f"q{number}", "question": f"Q{number}", "answers": marked}

    paragraphs = [{"context": "C", "qas": [question(1, "x"), question(2, "y", "z")]}, {"context": "D", "qas": []}]
    article = {"title": "T", "id": 1, "paragraphs": paragraphs}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [article, {**article, "title": "U"}]}))
    notes = DataNotes()
    examples = list(
        read_usable_examples(expand_sources([str(path)], "data.train")[0], DataSection(train=[str(path)]), notes)
    )
    assert [(e.row, e.messages[0].text, e.messages[0].input, e.messages[1].text) for e in examples] == [
        (1, "Q1", "C", "x"), (2, "Q2", "C", "y"), (3, "Q1", "C", "x"), (4, "Q2", "C", "y"),
    ]  # fmt: skip
    assert any("each record of 'paragraphs[].qas' is a row" in sentence for sentence in notes.remarks[str(path)])
    assert "lists 'qas' without a record are left out" in notes.remarks[str(path)]
    assert notes.ignored_keys[str(path)] == {"title": 4, "id": 4, "record.id": 4}


def test_records_in_one_list_become_rows_unless_the_holder_is_a_row_itself(write_rows: Callable[..., Path]) -> None:
    def read_file(rows: list[dict[str, Any]], **data: Any) -> list[tuple[str, ...]]:
        path = str(write_rows(rows))
        found = read_source_examples(expand_sources([path], "data.train")[0], DataSection.model_validate(data))
        return [tuple(message.text for message in example.messages) for example in found]

    topics = [
        {"topic": "wood", "items": [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]},
        {"topic": "lake", "items": [{"question": "e", "answer": "f"}]},
    ]
    assert read_file(topics) == [("a", "b"), ("c", "d"), ("e", "f")]
    own = [{"ask": "x", "say": "y", "items": topics[0]["items"]}] * 2
    assert read_file(own, fields={"instruction": "ask", "output": "say"}) == [("x", "y")] * 2
    assert read_file([{"question": "x", "answer": "y", "items": topics[0]["items"]}] * 2) == [("x", "y")] * 2
    with pytest.raises(DatasetError, match="no prompt found among its fields"):  # which of the two lists?
        read_file([{"items": topics[0]["items"], "more": topics[1]["items"]}] * 2)
    odd = [{"faq": [{"items": topics[0]["items"]}, {"items": "none"}, {"items": [1]}, {"items": None}, {"x": 1}]}] * 2
    assert read_file(odd, on_bad_row="skip") == [("a", "b"), ("c", "d")] * 2
    with pytest.raises(
        DatasetError, match=r"8 of 12 rows cannot be used:\n  rows 3, 4, 5, 9, 10 and 1 more: has no field"
    ):
        read_file(odd)
    with pytest.raises(DatasetError, match="no prompt found among its fields"):  # they may be one chat
        read_file([{"turns": topics[0]["items"]}] * 2)


def test_an_unanswerable_question_of_squad_names_its_kind() -> None:
    for answers in ([], {"text": [], "answer_start": []}):
        with pytest.raises(DatasetError, match=r"holds no answer.*data\.on_bad_row=skip"):
            read({"question": "a", "context": "c", "answers": answers})


def test_a_message_of_content_parts_is_their_text_and_a_list_is_no_prompt() -> None:
    parts = [{"type": "text", "text": "a"}, {"text": "b"}]
    assert read({"messages": [{"role": "user", "content": parts}, TURNS[1]]})[0].messages[0] == Message("user", "ab")
    with pytest.raises(DatasetError, match="message 1: 'content' is a list"):
        read({"messages": [{"role": "user", "content": ["a", "b"]}, TURNS[1]]})
    example, remarks = read({"messages": [TURNS[0], {"role": "assistant", "content": ["a", "b"]}]})
    assert example.messages[1].text == '["a","b"]' and remarks
