"""Answers that are data are compared as data: JSON by its values."""

from __future__ import annotations

import pytest

from training_lens.evaluation.metrics import json_fields, json_valid

DEEP = 100_000


@pytest.mark.parametrize(
    ("prediction", "valid"),
    [
        ('{"a": 1}', 1),
        ("", 0),
        ("  \n", 0),
        ('\n {"b": [1, 2]}\n', 1),
        ('\u00a0{"a": 1}\f', 1),  # white space of Unicode, at the ends
        ('{"a":\u00a01}', 0),
        ('{\n  "a": 1,\n  "b": 2\n}', 1),
        ('{"名": "北京"}', 1),
        ("5", 1),  # JSON, if not what was asked for: json_fields tells
        ('{"a": 1', 0),
        ("{'a': 1}", 0),
        ('{"a": 1,}', 0),
        ('```json\n{"a": 1}\n```', 0),
        ('Here it is: {"a": 1}', 0),
        ('{"a": NaN}', 0),
        ("[-Infinity]", 0),
        ('{"a": 1e999}', 1),
        (f"[{'9' * 5000}]", 1),  # more digits than Python makes an int of
        ("[1e99999999999999999999]", 0),
        ("[" * DEEP + "]" * DEEP, 0),
        ('{"a":' * DEEP, 0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_valid(prediction: str, valid: float) -> None:
    assert json_valid(prediction, '{"a": 1}') == valid


@pytest.mark.parametrize("reference", ["Tom", "", "5", '"text"', "null", "[NaN]", "[1] Tom", "[" * DEEP])
def test_json_metrics_apply_to_objects_and_arrays(reference: str) -> None:
    assert json_valid('{"a": 1}', reference) is None
    assert json_fields('{"a": 1}', reference) is None


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 1),
        ("", '{"a": 1}', 0),
        ("no JSON", '{"a": 1}', 0),
        ('```\n{"a": 1}\n```', '{"a": 1}', 0),
        ('{"a": 1}', '{"a": 1, "b": 2}', 1 / 2),
        ('{"a": 1, "b": 2, "c": 3}', '{"a": 1}', 1),  # what is beyond is not counted
        ('{\n "a": {"b": [1, 2, 4]},\n "c": "x"\n}', '{"a": {"b": [1, 2, 3]}, "c": "x"}', 3 / 4),
        ("[2, 1]", "[1, 2]", 0),
        ("[1]", "[1, 2, 3]", 1 / 3),
        ('{"a": 1.0}', '{"a": 1}', 1),
        ('{"a": 10e-1, "b": 0.10}', '{"a": 1, "b": 0.1}', 1),
        ('{"a": "1"}', '{"a": 1}', 0),
        ('{"a": true, "b": 1}', '{"a": 1, "b": true}', 0),
        ('{"a": null}', '{"a": null, "b": null}', 1 / 2),
        ('{"城": "北京"}', '{"城": "北京"}', 1),
        ('{"a": "\\u00e9"}', '{"a": "é"}', 1),
        ('{"0": "x"}', '["x"]', 0),  # a key is no position
        ("{}", "{}", 1),
        ('{"a": 1}', "{}", 0),  # the empty object is the value at the root
        ('{"a": [], "b": {}}', '{"a": [], "b": []}', 1 / 2),
        ('{"a": 1, "a": 2}', '{"a": 2}', 1),  # of a repeated key the last holds, as in json.loads
        ('{"a": 1e998}', '{"a": 1e999}', 0),
    ],
)
def test_json_fields(prediction: str, reference: str, score: float) -> None:
    assert json_fields(prediction, reference) == pytest.approx(score, abs=1e-12)


def test_whatever_can_be_parsed_can_be_compared() -> None:
    nested = next(text for text in ("[" * n + "1" + "]" * n for n in range(990, 90, -10)) if json_valid(text, "[]"))
    assert json_fields(nested, nested) == 1
    assert json_fields("[" * DEEP, nested) == 0
