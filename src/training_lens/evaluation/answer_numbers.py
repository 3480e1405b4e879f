"""Numbers in answers, in the notations of different places: 1,234.5; 1.234,5; 1 234,5; 1'234.5; 1,23,456."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Literal

DecimalMark = Literal["point", "comma"]
MORE_THAN_A_NUMBER = "a marked answer that is more than a number"

_MINUS, _APOSTROPHES = "\u2212\u2013\u2012\ufe63\uff0d", "\u2019\u02bc\u2018\uff07\u066c"
_PLAIN = dict.fromkeys(_MINUS, "-") | dict.fromkeys(_APOSTROPHES, "'")
_PLAIN |= {"\uff0c": ",", "\uff0e": ".", "\uff0b": "+", "\uff05": "%", "\u066a": "%"}
_DECIMAL_SIGN = "\u066b"  # Arabic's: it never groups digits

_CURRENCIES = (  # the commonest ISO codes, and abbreviations that people write
    "AED|AUD|BRL|CAD|CHF|CNY|CZK|DKK|EUR|GBP|HKD|HUF|IDR|ILS|INR|JPY|KRW|MXN|MYR|NOK|NZD|PHP|PLN|RON|RUB|SAR|SEK|SGD|"
    "THB|TRY|TWD|UAH|USD|VND|ZAR|Fr|Ft|Kč|kr|Rs|zł"
)
_MONEY = rf"(?:(?:{_CURRENCIES})(?![^\W\d_])\.?|[元円]|(?:[A-Z]{{1,3}})?\\?\$)"
_LEAD = rf"(?:[\s*_`~({{\[]|\\boxed\{{|\\[(\[]|{_MONEY})*"
_DIGITS = rf"(?:\d{{1,3}}(?: \d{{3}})+(?:[.,{_DECIMAL_SIGN}]\d+)?(?!\d)|\d(?:[\d.,'_{_DECIMAL_SIGN}]*\d)?|[.,]\d+)"
_NUMBER = re.compile(rf"{_LEAD}(?P<sign>[-+]?){_LEAD}(?P<digits>{_DIGITS})(?P<exponent>[eE][-+]?\d+)?")
_GOES_ON = re.compile(  # a list, a fraction, a time, a range, a power, a root, a sum or a product
    r"\s*(?:[-/:+x\u00d7·÷±\u2014,;]|\*{1,2}|)\s*[-+]?\d|[.~]\d|\s?\^\{?[-\d]"
    r"|\s?(?:[¼½¾⅐-⅞¹²³⁰⁴-⁹π√]|\\(?:[dt]?frac|times|cdot|div|pm|sqrt|pi))"
)
_TRAIL = re.compile(rf"(?:[\s*_`~.%)}}\]]|\\[)\]]|{_MONEY})*")
_BOXED = re.compile(r"\\boxed(\{(?:[^{}]|\{[^{}]*\})*\})")


def _number_pattern(group: str, mark: str) -> re.Pattern[str]:
    """A pattern for digits, grouped by three (or as in India) or not, with or without a decimal mark."""
    grouped = rf"[1-9]\d{{0,2}}(?P<sep>[{group}'_ ])\d{{3}}(?:(?P=sep)\d{{3}})*"
    indian = r"[1-9]\d?(?:,\d{2})+,\d{3}" if group == "," else r"(?!)"
    return re.compile(rf"(?:{grouped}|{indian}|\d+)(?:[{mark}{_DECIMAL_SIGN}]\d+)?|{mark}\d+")


_FORMS: dict[DecimalMark, re.Pattern[str]] = {
    "point": _number_pattern(",", "\\."),
    "comma": _number_pattern("\\.", ","),
}


@dataclass(frozen=True)
class Convention:
    """The decimal mark of ambiguous numbers such as 1,234, and the evidence for it.

    `point` and `comma` count the numbers of the references that are valid with that mark only.
    """

    decimal: DecimalMark = "point"
    point: int = 0
    comma: int = 0


def find_convention(references: Iterable[str]) -> Convention:
    """The decimal mark that the references use: in their marked answers, or else in all of their text.

    Only unambiguous numbers count (1,5 or 1.234,5, but not 1,234). A tie is the point.

    Example:
        >>> find_convention(["#### 1,5", "#### 2.000"]).decimal, find_convention(["#### 2,000"]).decimal
        ('comma', 'point')
    """
    texts = list(references)
    marked = Counter(mark for text in texts for mark in _decimal_marks(marked_answer(text) or ""))
    counts = marked or Counter(mark for text in texts for mark in _decimal_marks(text))
    decimal: DecimalMark = "comma" if counts["comma"] > counts["point"] else "point"
    return Convention(decimal, counts["point"], counts["comma"])


def _decimal_marks(text: str) -> list[DecimalMark]:
    """The decimal mark of each unambiguous number in a text."""
    found = [read_digits(match["digits"]) for match in _NUMBER.finditer(_normalize_text(text))]
    return [mark for values in found if len(values) == 1 for mark in values]


def marked_answer(text: str) -> str | None:
    r"""The text after the last `####` on its line, or in the last `\boxed{}`; None where there is neither."""
    _, hashes, behind = text.rpartition("####")
    if hashes:
        return behind.partition("\n")[0]
    boxed = _BOXED.findall(text)
    return str(boxed[-1]) if boxed else None


def read_number(text: str, decimal: DecimalMark = "point", *, alone: bool = False) -> Decimal | None:
    """The number at the start of a text; None where there is none.

    Ignored: spaces, bold and code marks, brackets, currency signs and codes, a percent sign after the digits. The minus
    may be a Unicode one. Thousands may be grouped by comma, point, apostrophe, underscore or space. What goes on after
    the digits (a list, a fraction, a time, a date, a range, a power, a product) is no number.

    Args:
        decimal: the decimal mark of ambiguous numbers: 1,234 is 1234 with `point` and 1.234 with `comma`.
        alone: require that nothing else follows the number.

    Example:
        >>> [str(read_number(t)) for t in ("1,234.5", "1.234,5", "**-$3**", "1,5", "3/4")]
        ['1234.5', '1234.5', '-3', '1.5', 'None']
    """
    plain = _normalize_text(text)
    match = _NUMBER.match(plain)
    if match is None or _GOES_ON.match(plain, match.end()) or (alone and not _TRAIL.fullmatch(plain, match.end())):
        return None
    values = read_digits(match["digits"])
    value = values.get(decimal, next(iter(values.values()), None))
    if value is None:
        return None
    try:
        return Decimal(f"{match['sign']}{value}{match['exponent'] or ''}")
    except InvalidOperation:  # an exponent beyond Decimal's
        return None


def read_digits(digits: str) -> dict[DecimalMark, str]:
    """The number that digits mean with each decimal mark, in Python's notation; invalid readings are left out.

    Digits without a mark have the same reading twice.

    Example:
        >>> read_digits("1,234"), read_digits("1,5"), read_digits("1,2,3")
        ({'point': '1234', 'comma': '1.234'}, {'comma': '1.5'}, {})
    """
    found: dict[DecimalMark, str] = {}
    for mark, form in _FORMS.items():
        if form.fullmatch(digits):
            sign = "." if mark == "point" else ","
            kept = "".join(char for char in digits if char.isdigit() or char in (sign, _DECIMAL_SIGN))
            found[mark] = kept.replace(sign, ".").replace(_DECIMAL_SIGN, ".")
    return found


def _normalize_text(text: str) -> str:
    """The text with ASCII digits, spaces, minus signs and apostrophes, and `$` for every currency sign."""
    return "".join(map(_normalize_character, text.replace("{,}", ",").replace("\\,", " ").replace("\\%", "%")))


@cache
def _normalize_character(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category in ("Sc", "Zs"):
        return "$" if category == "Sc" else " "
    return _PLAIN.get(char, char)


def numeric_match(prediction: str, reference: str, decimal: DecimalMark = "point") -> float | None:
    r"""1 where the prediction's marked answer is the same number as the reference's, else 0, as for GSM8K.

    The marked answer is the text after the last `####` on its line (Cobbe et al. 2021, "Training Verifiers to Solve
    Math Word Problems"), or in the last `\boxed{}`. Words after the prediction's number do not matter, as in GSM8K's
    own script; an unmarked number is wrong. None where the reference marks no number by itself: `#### 3. Steps` is a
    heading. See `read_number` for the notation of numbers.

    Example:
        >>> numeric_match("6 x 7 = 42\\n#### 42", "#### 42"), numeric_match("42", "#### 42")
        (1.0, 0.0)
    """
    expected = read_number(marked_answer(reference) or "", decimal, alone=True)
    if expected is None:
        return None
    return float(read_number(marked_answer(prediction) or "", decimal) == expected)


def has_unread_number(reference: str, decimal: DecimalMark = "point") -> bool:
    """Whether the marked answer has digits, and `numeric_match` does not apply to it: `#### 12 apples`."""
    return any(map(str.isdigit, marked_answer(reference) or "")) and numeric_match("", reference, decimal) is None


def describe_convention(references: Sequence[str], convention: Convention, setting: str) -> str:
    """A sentence on how the numbers of a set are read; empty where `numeric_match` applies to no reference."""
    if all(numeric_match("", reference, convention.decimal) is None for reference in references):
        return ""
    counted = convention.point + convention.comma
    why = "as no number of the references tells more"
    if setting != "auto":
        why = "as evaluation.decimal says"
    elif counted:
        why = f"as in {getattr(convention, convention.decimal)} of the {counted} numbers there that have one reading"
    means = "1234" if convention.decimal == "point" else "1.234"
    return f"a number like 1,234 is {means} (decimal {convention.decimal}), {why}"
