"""Fields are found by looking, reported, overridable; what is missing or ambiguous is an error with its place."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import pytest

from training_lens.config.data_sections import DataSection, DomainSection
from training_lens.data.examples import Example, Message, Row
from training_lens.data.fields import FieldMapping, collect_keys, find_mapping
from training_lens.data.row_reader import RowReader, strip_end_marks
from training_lens.errors import DatasetError


def mapping_of(keys: Collection[str], domain: DomainSection | None = None, **fields: str) -> FieldMapping:
    data = DataSection.model_validate({"fields": fields, "domain": domain or DomainSection()})
    return find_mapping(dict.fromkeys(keys, 1), data, "rows.jsonl")


def to_example(row: Row, mapping: FieldMapping, **settings: Any) -> Example:
    return RowReader(mapping, DataSection.model_validate(settings)).read_row(row)


def row(**values: Any) -> Row:
    return Row("rows.jsonl", 4, values)


@pytest.mark.parametrize(
    ("keys", "described"),
    [
        ({"instruction", "input", "output"}, "instruction + input -> output"),
        ({"question", "answer"}, "question -> answer"),
        ({"prompt", "completion"}, "prompt -> completion"),
        ({"prompt", "response", "id"}, "prompt -> response"),
        ({"instruction", "input", "response"}, "instruction + input -> response"),
        ({"messages", "source"}, "messages"),
        ({"conversations", "tools"}, "conversations + tools"),
        ({"text", "meta"}, "text"),
        ({"question", "answer", "domain"}, "question -> answer, domain from domain"),
        ({"system", "prompt", "completion"}, "system + prompt -> completion"),
    ],
)
def test_common_formats_are_found(keys: set[str], described: str) -> None:
    assert mapping_of(keys).describe() == described


def test_configured_fields_win() -> None:
    found = mapping_of({"question", "answer", "ask", "say"}, instruction="ask", output="say")
    assert (found.instruction, found.output) == ("ask", "say")
    assert mapping_of({"messages", "prompt", "response"}, messages="messages").messages == "messages"
    assert mapping_of({"messages", "prompt", "response"}, instruction="prompt").messages is None


@pytest.mark.parametrize(
    ("keys", "fields", "message"),
    [
        ({"ask"}, {}, r"no prompt found .*\(ask\).*data\.fields\.instruction=FIELD"),
        ({"question"}, {}, r"no answer found .*data\.fields\.output=FIELD"),
        (
            {"question", "answer", "response"},
            {},
            r"'answer' \(row 1\) and 'response' \(row 1\) could each be the output",
        ),
        (
            {"messages", "prompt", "response"},
            {},
            r"could be read as messages \(row 1\) or as prompt -> response \(row 1\). Say which: ",
        ),
        ({"question", "answer"}, {"output": "anwser"}, "no field 'anwser'. Did you mean 'answer'"),
        ({"input", "output"}, {}, r"Is it 'input'\? Name it: data\.fields\.instruction=input"),
        ({"text", "output"}, {}, r"without 'output'\. .*data\.fields\.instruction=text; .*data\.fields\.text=text"),
        ({"text", "prompt"}, {}, r"without 'prompt'\. .*data\.fields\.output=text; .*data\.fields\.text=text"),
    ],
)
def test_what_is_missing_or_ambiguous_is_said(keys: set[str], fields: dict[str, str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        mapping_of(keys, **fields)


def test_rows_become_messages() -> None:
    mapping = mapping_of({"instruction", "input", "output", "domain"})
    example = to_example(row(instruction="Do", input="This", output="Done", domain="law"), mapping)
    assert example.messages == (Message("user", "Do", "This"), Message("assistant", "Done"))
    assert (example.domain, example.id) == ("law", "rows.jsonl:4")
    assert to_example(row(instruction="Do", output="7", domain="x"), mapping).messages[0].input == ""


def test_the_domain_can_be_the_file() -> None:
    mapping = mapping_of({"question", "answer"}, DomainSection(per_file=True))
    assert to_example(row(question="a", answer="b"), mapping, domain={"field": None, "per_file": True}).domain == "rows"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "a"}, r"rows\.jsonl, row 4: has no field 'answer'"),
        ({"question": "a", "answer": None}, "row 4: 'answer' is null"),
        ({"question": "a", "answer": ""}, "row 4: 'answer' is empty"),
        ({"question": "a", "answer": " \n"}, "row 4: 'answer' is only white space"),
        ({"question": "a", "answer": float("nan")}, "row 4: 'answer' is NaN"),
        ({"question": True, "answer": "b"}, "row 4: 'question' is a bool"),
        ({"question": {"text": "a"}, "answer": "b"}, "row 4: 'question' is a dict"),
        ({"question": ["a"], "answer": "b"}, "row 4: 'question' is a list"),
    ],
)
def test_unusable_rows_name_row_and_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        to_example(row(**values), mapping_of({"question", "answer"}))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", "'messages' is a str, expected a list"),
        ([], "'messages' is empty"),
        ([{"role": "user", "content": "a"}], "ends with a user message"),
        ([{"role": "robot", "content": "a"}], "message 1: role 'robot' is none of system, user, assistant, tool"),
        ([{"role": "user"}], "message 1: expected an object with 'role' and 'content'"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "b"}], "message 1: 'content' is null"),
        ([{"from": "gpt", "value": "a"}], "begins with a message of the assistant"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: has a part of type 'image'"),
        ([{"role": "user", "content": "a", "loss_weight": 0.5}], "'loss_weight' is 0.5, expected 0 or 1"),
        ([{"role": "user", "content": "a", "loss_weight": 1}], "only an assistant's can be learned"),
        (
            [{"from": "human", "value": "a"}, {"from": "function_call", "value": "no"}],
            "expected a function call in JSON",
        ),
        ([{"from": "hunan", "value": "a"}], "Did you mean 'human'"),
        (
            [{"role": "User", "content": "a"}, {"role": "ASSISTANT", "content": "b"}, {"role": "Tool", "content": "c"}],
            "ends with a tool message",
        ),
    ],
)
def test_broken_chats_name_row_and_turn(messages: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        to_example(row(messages=messages), mapping_of({"messages"}))


def test_a_mixed_file_names_the_rows_and_what_to_set() -> None:
    rows = [Row("f.jsonl", 1, {"question": "a", "answer": "b"}), Row("f.jsonl", 7, {"prompt": "a", "completion": "b"})]
    with pytest.raises(
        DatasetError, match=r"'question' \(row 1\) and 'prompt' \(row 7\) .*data\.fields\.instruction="
    ) as e:
        find_mapping(collect_keys(rows), DataSection(), "f.jsonl")
    assert "several files" in str(e.value)
    rows[1] = Row("f.jsonl", 9, {"messages": []})
    with pytest.raises(DatasetError, match=r"messages \(row 9\) or as question -> answer \(row 1\)"):
        find_mapping(collect_keys(rows), DataSection(), "f.jsonl")


def test_sharegpt_and_messages_become_the_same_example() -> None:
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Yes"}]
    one = to_example(row(conversations=share), mapping_of({"conversations"}))
    assert one == to_example(row(messages=chat), mapping_of({"messages"}))


def test_calls_and_tools_are_understood_in_both_spellings() -> None:
    call = {"name": "search", "arguments": {"q": "rice"}}
    share = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "[]"},
        {"from": "gpt", "value": "None found."},
    ]
    openai = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {**call, "arguments": '{"q": "rice"}'}}]},
        {"role": "tool", "content": "[]"},
        {"role": "assistant", "content": "None found."},
    ]
    tool = {"name": "search", "description": "d"}
    first = to_example(row(conversations=share, tools=json.dumps([tool])), mapping_of({"conversations", "tools"}))
    second = to_example(row(messages=openai, tools=[tool]), mapping_of({"messages", "tools"}))
    assert first.messages[1].calls == second.messages[1].calls == (call,)
    assert [m.role for m in first.messages] == ["user", "assistant", "tool", "assistant"]
    assert first.tools == second.tools == ({"type": "function", "function": tool},)


def test_loss_weight_0_is_not_learned() -> None:
    chat = [
        {"role": "user", "content": "a", "loss_weight": 0.0},
        {"role": "assistant", "content": "b", "loss_weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "loss_weight": 1.0},
    ]
    learned = [
        m.learn for m in to_example(row(messages=chat), mapping_of({"messages"})).messages if m.role == "assistant"
    ]
    assert learned == [False, True]


def test_text_stands_alone() -> None:
    example = to_example(row(text="A story."), mapping_of({"text"}))
    assert example.is_text and example.messages == (Message("assistant", "A story."),)


def test_end_marks_are_taken_off_answers_alone() -> None:
    example = to_example(row(prompt="Say </s>", completion=" Yes<|endoftext|>\n"), mapping_of({"prompt", "completion"}))
    stripped, marks = strip_end_marks(example)
    assert [m.text for m in stripped.messages] == ["Say </s>", " Yes"] and marks == ["<|endoftext|>"]
    assert strip_end_marks(stripped) == (stripped, [])


def test_a_key_that_shows_late_is_seen() -> None:
    rows = [Row("f", i, {"question": "a", "answer": "b"}) for i in range(1, 300)]
    rows.append(Row("f", 300, {"question": "a", "answer": "b", "context": "c", "domain": "d"}))
    assert collect_keys(rows) == {"question": 1, "answer": 1, "context": 300, "domain": 300}


def test_the_form_asked_for_looks_for_its_own_fields_alone() -> None:
    keys = {"messages", "prompt", "question", "answer"}
    assert mapping_of(keys, messages="messages").messages == "messages"


def test_what_is_said_beside_a_call_is_kept_and_thoughts_apart_are_refused() -> None:
    call = {"function": {"name": "search", "arguments": "{}"}}
    turn = {"role": "assistant", "content": "Let me look.", "tool_calls": [call]}
    answer = {"role": "tool", "content": "[]", "tool_call_id": "1", "name": "search"}
    chat = [{"role": "user", "content": "Hi"}, turn, answer, {"role": "assistant", "content": "None."}]
    messages = to_example(row(messages=chat), mapping_of({"messages"})).messages
    assert messages[1].text == "Let me look." and len(messages[1].calls) == 1
    assert messages[2].extra == {"name": "search", "tool_call_id": "1"}
    chat[-1] = {**chat[-1], "reasoning_content": "hm"}
    with pytest.raises(DatasetError, match=r"'reasoning_content' stands apart .*data\.thinking=true"):
        to_example(row(messages=chat), mapping_of({"messages"}))


@pytest.mark.parametrize(("text", "what"), [("a \ud800", "half a surrogate"), ("\ufdd0", "a noncharacter")])
def test_text_that_is_no_text_is_refused(text: str, what: str) -> None:
    with pytest.raises(DatasetError, match=f"row 4: 'answer' holds {what}"):
        to_example(row(question="a", answer=text), mapping_of({"question", "answer"}))


@pytest.mark.parametrize(("given", "kept"), [("call_0", "call_0"), (0, "0"), (17, "17")])
def test_ids_and_null_content_of_calls_are_kept(given: Any, kept: str) -> None:
    call = {"id": given, "type": "function", "function": {"name": "search", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "[]", "tool_call_id": given},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    _, asked, told, again = to_example(row(messages=turns), mapping_of({"messages"})).messages
    assert asked.calls == ({"id": kept, "name": "search", "arguments": {}},) and asked.null_content
    assert told.extra == {"tool_call_id": kept} and not again.null_content
    assert asked.calls_without_ids == [{"name": "search", "arguments": {}}]


@pytest.mark.parametrize(
    ("keys", "fields", "message"),
    [
        (
            {"question", "answer", "context"},
            {"instruction": "answer", "output": "context"},
            r"'context' is read as input and as output \(data\.fields\.output names it\).*data\.fields\.input=none",
        ),
        ({"question", "answer"}, {"input": "answer"}, r"'answer' is read as input and as output .*data\.fields\.input"),
        ({"ask"}, {"instruction": "ask", "output": "ask"}, r"as instruction and as output.*data\.fields\.output=FIELD"),
        ({"ask", "system"}, {"instruction": "system", "output": "ask"}, r"is read as system and as instruction"),
        ({"messages", "tools"}, {"system": "tools"}, r"'tools' is read as system and as tools"),
        ({"question", "answer", "domain"}, {"input": "domain"}, r"as input and as domain .*data\.domain\.field=null"),
    ],
)  # fmt: skip
def test_a_key_has_one_meaning(keys: set[str], fields: dict[str, str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        mapping_of(keys, **fields)


def test_a_meaning_can_be_left_out() -> None:
    found = mapping_of({"question", "answer", "context"}, instruction="answer", output="context", input="none")
    assert found.describe() == "answer -> context"
    assert mapping_of({"question", "answer", "none"}, input="none").input == "none"  # where a key is called so
    with pytest.raises(DatasetError, match=r"data\.fields\.output: rows\.jsonl has no field 'none'"):
        mapping_of({"question", "answer"}, output="none")


def test_what_is_not_wanted_may_be_learned_alone() -> None:
    found = mapping_of({"prompt", "chosen", "rejected"}, output="rejected")
    assert (found.output, found.rejected) == ("rejected", None)
    assert mapping_of({"chosen", "rejected"}, messages="chosen").output is None
