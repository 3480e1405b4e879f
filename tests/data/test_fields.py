"""Fields are found by looking, reported, overridable; what is missing or ambiguous is an error with its place."""

from __future__ import annotations

from typing import Any

import pytest

from training_lens.config.schema import DomainSection, FieldsSection
from training_lens.data.fields import FieldMapping, find_mapping, to_example
from training_lens.data.types import Message, Row
from training_lens.errors import DatasetError


def mapping_of(keys: set[str], domain: DomainSection | None = None, **fields: str) -> FieldMapping:
    return find_mapping(keys, FieldsSection(**fields), domain or DomainSection(), "rows.jsonl")


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
        ({"text"}, {}, r"no prompt found .*\(text\).*data\.fields\.instruction=FIELD"),
        ({"question"}, {}, r"no answer found .*data\.fields\.output=FIELD"),
        ({"question", "answer", "response"}, {}, r"answer and response could each be the output"),
        ({"messages", "prompt", "response"}, {}, "could be read as messages or as prompt -> response"),
        ({"question", "answer"}, {"output": "anwser"}, "no field 'anwser'. Did you mean 'answer'"),
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
    assert to_example(row(question="a", answer="b"), mapping, per_file_domain=True).domain == "rows"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "a"}, r"rows\.jsonl, row 4: has no field 'answer'"),
        ({"question": "a", "answer": None}, "row 4: 'answer' is null"),
        ({"question": "a", "answer": ""}, "row 4: 'answer' is empty"),
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
        ([{"role": "robot", "content": "a"}], "message 1: role 'robot' is none of system, user, assistant"),
        ([{"role": "user"}], "message 1: expected an object with 'role' and 'content'"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "b"}], "message 1: 'content' is null"),
    ],
)
def test_broken_chats_name_row_and_turn(messages: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        to_example(row(messages=messages), mapping_of({"messages"}))
