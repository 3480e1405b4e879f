"""Nested records to rows: articles with paragraphs with questions, as SQuAD's own files hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from training_lens.data.examples import Row

PARAGRAPHS, QUESTIONS = "paragraphs", "qas"
FLATTENED = "holds articles with paragraphs and questions (SQuAD); each question is a row, numbered from 1"
WITHOUT_QUESTIONS = "paragraphs without questions are left out"


def flatten_records(rows: Iterator[Row], say: Callable[[str], None]) -> Iterator[Row]:
    """The rows, of which an article becomes a row for each of its questions, with what stands around the question.

    Args:
        say: told of articles, and of paragraphs that hold no question.
    """
    number = 0
    for row in rows:
        if not _is_article(row.values):
            number = max(row.number, number + 1)
            yield row if number == row.number else replace(row, number=number)
            continue
        say(FLATTENED)
        for values in _questions(row.values, say):
            number += 1
            yield Row(row.file, number, values)


def _is_article(values: Mapping[str, Any]) -> bool:
    paragraphs = values.get(PARAGRAPHS)
    return (
        isinstance(paragraphs, list)
        and bool(paragraphs)
        and all(isinstance(paragraph, Mapping) and _objects(paragraph.get(QUESTIONS)) for paragraph in paragraphs)
    )


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _questions(article: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    for paragraph in article[PARAGRAPHS]:
        if not paragraph[QUESTIONS]:
            say(WITHOUT_QUESTIONS)
        around = _merge(article, PARAGRAPHS, paragraph)
        yield from (_merge(around, QUESTIONS, question) for question in paragraph[QUESTIONS])


def _merge(outer: Mapping[str, Any], without: str, inner: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of an object and of the one around it, there with 'record.' before them where both have the key."""
    kept = {key: value for key, value in outer.items() if key != without}
    return {**{f"record.{key}" if key in inner else key: value for key, value in kept.items()}, **inner}
