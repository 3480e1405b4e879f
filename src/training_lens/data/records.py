"""Nested records to rows: articles with paragraphs with questions, as SQuAD's own files hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from training_lens.data.examples import Row

PARAGRAPHS, QUESTIONS = "paragraphs", "qas"
FLATTENED = "holds articles with paragraphs and questions (SQuAD); each question is a row, numbered from 1"
WITHOUT_QUESTIONS = "paragraphs without questions are left out"


def flatten_records(rows: Iterator[Row], add_remark: Callable[[str], None]) -> Iterator[Row]:
    """The rows, of which an article becomes a row for each of its questions, with what stands around the question.

    Args:
        add_remark: told of articles, and of paragraphs that hold no question.
    """
    number = 0
    for row in rows:
        if not _is_article(row.values):
            number = max(row.number, number + 1)
            yield row if number == row.number else replace(row, number=number)
            continue
        add_remark(FLATTENED)
        for values in _list_questions(row.values, add_remark):
            number += 1
            yield Row(row.file, number, values)


def _is_article(values: Mapping[str, Any]) -> bool:
    paragraphs = values.get(PARAGRAPHS)
    return (
        isinstance(paragraphs, list)
        and bool(paragraphs)
        and all(
            isinstance(paragraph, Mapping) and _is_object_list(paragraph.get(QUESTIONS)) for paragraph in paragraphs
        )
    )


def _is_object_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _list_questions(article: Mapping[str, Any], add_remark: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    for paragraph in article[PARAGRAPHS]:
        if not paragraph[QUESTIONS]:
            add_remark(WITHOUT_QUESTIONS)
        around = _merge_objects(article, PARAGRAPHS, paragraph)
        yield from (_merge_objects(around, QUESTIONS, question) for question in paragraph[QUESTIONS])


def _merge_objects(outer: Mapping[str, Any], without: str, inner: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of an object and of the one around it, there with 'record.' before them where both have the key."""
    kept = {key: value for key, value in outer.items() if key != without}
    return {**{f"record.{key}" if key in inner else key: value for key, value in kept.items()}, **inner}
