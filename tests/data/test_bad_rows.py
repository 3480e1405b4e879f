"""All rows that cannot be used are told at once, by kind, with their numbers; or left out and listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens.config.data_sections import DataSection
from training_lens.data.notes import DataNotes
from training_lens.data.source_reader import read_examples, read_source_examples
from training_lens.data.sources import expand_sources
from training_lens.data.split_report import describe_losses as describe_losses
from training_lens.data.templates import build_renderer
from training_lens.data.token_cache import Split, prepare_split
from training_lens.data.token_pipeline import Preparation, collect_example_errors, tokenize
from training_lens.data.tokenization import TextEncoder
from training_lens.display.progress import Progress
from training_lens.errors import DatasetError

GOOD = [{"question": f"Where is {i}?", "answer": f"In box {i}."} for i in range(6)]
EMPTY = {"question": "Who?", "answer": ""}
CALLS_NOTHING = (
    "{% for m in messages %}{% if m.content == 'Refuse me' %}{{ raise_exception('no place for this') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def prepare(tokenizer: Any, paths: list[Path], cache: Path, **data: Any) -> Split:
    section = DataSection.model_validate(data)
    ready = Preparation(section, build_renderer(section, tokenizer), TextEncoder(tokenizer), 64, "")
    return prepare_split([str(path) for path in paths], "data.train", ready, cache, Progress())


@pytest.fixture
def strict_tokenizer(embedded_tokenizer: Any) -> Any:
    """A tokenizer whose template refuses one text."""
    import copy

    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = CALLS_NOTHING
    return tokenizer


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Two sources with rows that are bad in reading, in their fields and for the template, and a good one."""
    rows: list[Any] = [*GOOD, EMPTY, EMPTY, {"question": "Refuse me", "answer": "No."}]
    (a := tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"question": ', "[1]", ""]))
    (b := tmp_path / "b.csv").write_text("question,answer\nq,a\nq\nr,a,c\ns,b\n")
    (c := tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, GOOD)))
    return [a, b, c]


def test_one_error_names_every_bad_row_of_every_source(
    strict_tokenizer: Any, sources: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(DatasetError) as caught:
        prepare(strict_tokenizer, sources, tmp_path / "cache")
    text = str(caught.value)
    assert f"{sources[0]}: 5 of 11 rows cannot be used:" in text and f"{sources[1]}: 2 of 4 rows" in text
    assert "rows 7 and 8: 'answer' is empty" in text and "row 9: " in text and "row 10: broken JSON" in text
    assert "rows 3 and 4: has 1 cells" in text and "c.jsonl" not in text
    assert text.endswith("To continue without them: data.on_bad_row=skip.")
    assert list((tmp_path / "cache").iterdir()) == []


def test_skipped_rows_are_left_out_and_listed(strict_tokenizer: Any, sources: list[Path], tmp_path: Path) -> None:
    split = prepare(strict_tokenizer, sources, tmp_path / "cache", on_bad_row="skip")
    bad = split.report.bad_rows
    assert sorted(number for rows in bad[str(sources[0])].values() for number in rows) == [7, 8, 9, 10, 11]
    assert list(bad[str(sources[1])].values()) == [[3, 4]] and str(sources[2]) not in bad
    assert split.report.rows == len(split.dataset) == 6 + 2 + 6
    assert {split.dataset[i].id for i in range(6)} == {f"{sources[0]}:{number}" for number in range(1, 7)}
    said = "\n".join(describe_losses(split.report, 64))
    assert f"{sources[0]}: 5 rows cannot be used, left out (data.on_bad_row=skip)" in said
    assert "rows 7 and 8: 'answer' is empty" in said


def test_skipping_leaves_the_tokens_of_good_rows_as_they_are(
    strict_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    mixed = prepare(strict_tokenizer, [write_rows([EMPTY, *GOOD])], tmp_path / "cache", on_bad_row="skip").dataset
    good = prepare(strict_tokenizer, [write_rows(GOOD)], tmp_path / "cache").dataset
    assert [row.input_ids.tolist() for row in mixed] == [row.input_ids.tolist() for row in good]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("line", [json.dumps(EMPTY), '{"question": ', '{"question": "Refuse me", "answer": "No."}'])
def test_a_source_of_bad_rows_alone_is_refused_either_way(
    strict_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path, on_bad_row: str, line: str
) -> None:
    (bad := tmp_path / "bad.jsonl").write_text(f"{line}\n" * 3)
    with pytest.raises(
        DatasetError, match=r"bad\.jsonl: none of its 3 rows can be used:\n  rows 1, 2 and 3: "
    ) as caught:
        prepare(strict_tokenizer, [write_rows(GOOD), bad], tmp_path / "cache", on_bad_row=on_bad_row)
    assert "skip" not in str(caught.value)


def test_one_bad_row_has_its_own_words_and_the_way_out(write_rows: Callable[..., Path]) -> None:
    path = write_rows([*GOOD, EMPTY])
    with pytest.raises(
        DatasetError, match=r"row 7: 'answer' is empty.*\nTo continue without it: data\.on_bad_row=skip\."
    ):
        list(read_examples([str(path)], "data.train", DataSection()))


def test_rows_for_answers_and_evaluation_follow_the_same_rule(
    sources: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    specs = [str(path) for path in sources]
    with pytest.raises(DatasetError, match=r"4 of 11 rows cannot be used:\n  rows 7 and 8: "):
        list(read_examples(specs, "data.validation", DataSection()))
    found = list(read_examples(specs, "data.validation", DataSection(on_bad_row="skip")))
    assert [example.row for example in found if example.file == specs[0]] == [1, 2, 3, 4, 5, 6, 9]
    assert f"data.validation: {specs[0]}: 4 rows cannot be used, left out" in caplog.text


def test_in_error_mode_nothing_follows_a_bad_row(write_rows: Callable[..., Path]) -> None:
    (source,) = expand_sources([str(write_rows([*GOOD[:2], EMPTY, *GOOD[2:]]))], "data.train")
    coming = read_source_examples(source, DataSection(), DataNotes())
    assert [next(coming).row, next(coming).row] == [1, 2]
    with pytest.raises(DatasetError, match="row 3"):
        next(coming)


def test_a_row_that_the_template_refuses_is_dropped_where_rows_are_skipped(
    strict_tokenizer: Any, write_rows: Callable[..., Path]
) -> None:
    path = write_rows([GOOD[0], {"question": "Refuse me", "answer": "No."}, GOOD[1]])
    section = DataSection(on_bad_row="skip")
    ready = Preparation(section, build_renderer(section, strict_tokenizer), TextEncoder(strict_tokenizer), 64, "")
    examples, notes = list(read_examples([str(path)], "data.train", section)), DataNotes()
    assert [row and row.row for row in tokenize(examples, ready, notes)] == [1, None, 3]
    assert list(notes.bad_row_reasons[str(path)].values()) == [[2]]


def test_one_error_names_every_example_that_the_template_refuses(
    strict_tokenizer: Any, write_rows: Callable[..., Path]
) -> None:
    refused = {"question": "Refuse me", "answer": "No."}
    path = write_rows([GOOD[0], refused, GOOD[1], refused])
    section = DataSection()
    ready = Preparation(section, build_renderer(section, strict_tokenizer), TextEncoder(strict_tokenizer), 64, "")
    error = collect_example_errors(list(read_examples([str(path)], "data.validation", section)), ready)
    assert str(error).startswith(f"{path}: 2 of 4 rows cannot be used:\n  rows 2 and 4: ")
    assert (
        collect_example_errors(list(read_examples([str(write_rows(GOOD))], "data.validation", section)), ready) is None
    )
