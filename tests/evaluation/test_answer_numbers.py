"""Numbers are read as people write them; what has two readings is read as the right answers are written."""

from __future__ import annotations

import doctest
import json
from decimal import Decimal
from pathlib import Path

import pytest

from training_lens.evaluation import answer_numbers
from training_lens.evaluation.answer_numbers import describe_convention, find_convention, numeric_match, read_number


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[(text, "1234.5") for text in ("1,234.5", "1.234,5", "1 234,5", "1\u202f234.5", "1'234.5", "1\u2019234,5")],
        *[(text, "123456") for text in ("1,23,456", "\u20b91,23,456", "123 456", "123_456", "1e5 and", "123.456,0")],
        *[(text, "5") for text in ("**5**", "`5`", "__5__", "5.", "(5)", "$5", "5 \u20ac", "US$5", "5%", "\\boxed{5}")],
        *[
            (text, "12")
            for text in ("EUR 12", "EUR12", "12 EUR.", "**CHF 12**", "Rs. 12", "12 kr", "12 z\u0142", "12\u5186")
        ],
        *[(text, "12") for text in ("12 apples", "12 (a dozen)", "12 euros, 3 cents", "12^\\circ", "12\\text{ km}")],
        *[(text, "-3") for text in ("-3", "\u22123", "-$3", "$-3", "**\u2212$3**", "- 3")],
        *[(text, "1.5") for text in ("1,5", "1.5", "1,50", "\u0661\u066b\u0665", "\uff11.\uff15", "+1,5 kg")],
        *[(text, "1234567") for text in ("1,234,567", "1.234.567", "12,34,567", "$1{,}234{,}567")],
        ("0,125", "0.125"),  # no group of thousands begins with 0
        ("1e3", "1000"),
    ],
)
def test_a_number_is_read_by_its_form(written: str, value: str) -> None:
    wanted = Decimal(100000) if written == "1e5 and" else Decimal(value)
    assert read_number(written, "point") == read_number(written, "comma") == wanted


@pytest.mark.parametrize(("written", "point", "comma"), [("1,234", "1234", "1.234"), ("1.234", "1.234", "1234")])
def test_a_number_with_two_readings_is_read_as_the_set_writes_numbers(written: str, point: str, comma: str) -> None:
    assert read_number(written, "point") == Decimal(point) and read_number(written, "comma") == Decimal(comma)


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "x5", "--5", "EURO 5"),
        *("1,2,3", "1, 2, 3", "1; 2", "1 23", "10 000 00", "1.2.3", "1,23,4"),
        *("5/6", "5 / 6", "3 1/2", "3\u00bd", "3 \u00bd", "3\\frac{1}{2}", "12:30", "2024-01-05", "05.01.2024"),
        *("5-6", "5 \u2013 6", "5\u20146", "5~6", "5..6", "5 \u00b1 1"),
        *(
            "2^10",
            "2**10",
            "10^{-3}",
            "10\u00b2",
            "3x4",
            "3 * 4",
            "3+4",
            "1.5 \u00d7 10^3",
            "3\\times 4",
            "2\u03c0",
            "3\\sqrt{2}",
        ),
    ],
)
def test_what_goes_on_after_the_digits_is_no_number(text: str) -> None:
    assert read_number(text) is None


def test_only_numbers_with_one_reading_tell_the_convention() -> None:
    assert find_convention(["#### 1,5", "#### 2,000", "#### 3.000"]).decimal == "comma"
    assert find_convention(["#### 2,000", "#### 3.000"]).decimal == "point"
    assert find_convention(["It costs 3.50 now.\n#### 1,5"]).decimal == "comma"  # the marked answer comes first
    assert find_convention(["It costs 3,50.\n#### 1"]).decimal == "comma"
    assert find_convention([]) == answer_numbers.Convention()


def test_how_numbers_are_read_is_told() -> None:
    references = ["#### 1,5", "#### 2,5", "#### 1,000"]
    found = find_convention(references)
    assert describe_convention(references, found, "auto") == (
        "a number like 1,234 is 1.234 (decimal comma), as in 2 of the 2 numbers there that have one reading"
    )
    assert "evaluation.decimal says" in describe_convention(references, found, "comma")
    assert describe_convention(["no number"], found, "auto") == ""


def test_answers_with_decimal_commas() -> None:
    check_decimal_commas([f"Das ist {n},5.\n#### {n},5" for n in range(1, 13)])


def test_the_shared_rows_with_decimal_commas(shared: Path) -> None:
    file = shared / "cases/26-numbers/decimal_comma.jsonl"
    check_decimal_commas([json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()])


def check_decimal_commas(references: list[str]) -> None:
    """Numbers with a point mean the same, and without either another."""
    decimal = find_convention(references).decimal
    assert decimal == "comma"
    for reference in references:
        assert numeric_match(reference, reference, decimal) == 1
        assert numeric_match(reference.replace(",", ""), reference, decimal) == 0
        assert numeric_match(reference.replace(",", "."), reference, decimal) == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("6 x 7 = 42\n#### 42", "7 x 6\n#### 42", 1),
        ("", "#### 42", 0),
        ("42", "#### 42", 0),
        ("####", "#### 42", 0),
        ("#### none", "#### 42", 0),
        ("#### 1,234", "#### 1234", 1),
        ("#### 1 234", "#### 1,234", 1),
        ("#### $1,000.00", "#### 1000", 1),
        ("####5.0", "#### 5", 1),
        ("#### 5.", "#### 5", 1),
        ("#### 5", "#### 5.", 1),
        ("#### -$3", "#### -3", 1),
        ("#### $-3", "#### 3", 0),
        ("#### .5", "#### 0.50", 1),
        ("#### 41\n#### 42\n", "#### 42", 1),  # the last one
        ("#### 42\n#### 41", "#### 42", 0),
        ("#### 42 apples", "#### 42", 1),
        ("#### 42\nand so on", "#### 42", 1),
        ("####\n42", "#### 42", 0),
        ("#### 4\u0662", "#### 42", 1),  # an Arabic digit two
        ("#### 0.1", "#### 0.10000000000000001", 0),
        ("#### 5", "#### 4\n#### 5", 1),
        ("#### 15", "#### 1,5", 0),
        ("#### 1.5", "#### 1,5", 1),
        ("#### 5/2", "#### 5", 0),
        ("so \\boxed{42}", "#### 42", 1),
        ("#### **42**", "\\boxed{42}", 1),
        ("#### 1e99999999999999999999", "#### 1", 0),
    ],
)
def test_numeric(prediction: str, reference: str, score: float) -> None:
    assert numeric_match(prediction, reference) == score


@pytest.mark.parametrize("reference", ["42", "", "####", "#### none", "#### 3. Steps\nFirst", "#### 5 apples", "### 5"])
def test_numeric_applies_to_answers_in_the_form_of_gsm8k(reference: str) -> None:
    assert numeric_match("#### 5", reference) is None


def test_the_examples_of_the_docstrings_hold() -> None:
    failed, tried = doctest.testmod(answer_numbers)
    assert tried >= 4 and not failed
