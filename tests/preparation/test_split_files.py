"""What is written trains like what was read: the same tokens, the same masks, in every form and format."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from own_forms import ANSWERS, OWN_FORMS, QUESTIONS  # type: ignore[import-not-found]
from pairwise import pairwise  # type: ignore[import-not-found]

from training_lens import embedded
from training_lens.config.data_sections import DataSection
from training_lens.data.examples import Example, Row
from training_lens.data.source_reader import read_examples
from training_lens.data.sources import expand_sources
from training_lens.data.templates import build_renderer
from training_lens.data.token_pipeline import Preparation, tokenize
from training_lens.data.tokenization import TextEncoder
from training_lens.display.progress import Progress
from training_lens.errors import DatasetError
from training_lens.preparation.corpus import Corpus
from training_lens.preparation.split_files import (
    FileFormat,
    Form,
    build_reading_settings,
    choose_form,
    convert_row,
    open_writer,
)

ROWS = 20
FORMATS: tuple[FileFormat, ...] = ("jsonl", "parquet")
CHATS = ("sharegpt-tools", "messages", "messages-loss-weight")
REAL_FORMS = {
    "data/gsm8k/train.jsonl": "pair",
    "data/llama_factory/alpaca_en_demo.json": "pair",
    "data/llama_factory/glaive_toolcall_en_demo.json": "messages",
    "data/llama_factory/kto_en_demo.json": "messages",
    "data/llama_factory/v1_sft_demo.jsonl": "messages",
    "data/llama_factory/c4_demo.jsonl": "text",
    "data/t0_per_template/trec_trec1.jsonl": "pair",  # answers of nothing but an end mark
}


def rewrite(specs: list[str], target: Path, file_format: FileFormat, **data: Any) -> tuple[Path, Form, DataSection]:
    """The first rows of the sources in one file, its form, and the settings that read it."""
    section = DataSection(train=specs, **data)
    corpus = Corpus.from_sources(expand_sources(specs, "data.train"), section, Progress())
    form = choose_form(corpus, file_format)
    path = target / f"all.{file_format}"
    rows = list(islice(corpus.read_rows("reading"), ROWS * len(specs)))
    with closing(open_writer(path, form, any(example.domain is not None for _, example in rows))) as writer:
        for row, example in rows:
            writer.write(row, convert_row(row, example, form, section.domain.per_file))
    return path, form, build_reading_settings(form, section)


def tokens(specs: list[str], section: DataSection, tokenizer: Any) -> list[Any]:
    """Ids, mask, domain and text hash of the first rows."""
    ready = Preparation(section, build_renderer(section, tokenizer), TextEncoder(tokenizer), 4096, "")
    examples = list(islice(read_examples(specs, "data.train", section), ROWS * len(specs)))
    return [t and (t.input_ids.tolist(), t.loss_mask.tolist(), t.domain, t.digest) for t in tokenize(examples, ready)]


def check_rewritten(spec: str, file_format: FileFormat, template: str, tokenizer: Any, folder: Path) -> str:
    """What is written has the tokens and masks of the source; gives its form."""
    path, form, section = rewrite([spec], folder, file_format, template=template)
    before = tokens([spec], DataSection(template=template), tokenizer)
    assert tokens([str(path)], section, tokenizer) == before
    assert any(before) or "trec" in spec
    return form


@pytest.mark.parametrize(
    ("source", "file_format", "template"), pairwise([*OWN_FORMS, embedded.TRAIN], FORMATS, ["chat", "alpaca"])
)
def test_tokens_and_masks_are_those_of_the_source(
    source: str,
    file_format: FileFormat,
    template: str,
    embedded_tokenizer: Any,
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    rows = [OWN_FORMS[source](*pair) for pair in zip(QUESTIONS, ANSWERS, strict=True)] if source in OWN_FORMS else []
    spec = str(write_rows(rows)) if rows else source
    form = check_rewritten(spec, file_format, template, embedded_tokenizer, tmp_path)
    written = "text" if source == "text" else "messages" if source in CHATS else "pair"
    assert form == ("as_read" if file_format == "jsonl" else written)


@pytest.mark.parametrize(("source", "file_format", "template"), pairwise(list(REAL_FORMS), FORMATS, ["chat", "alpaca"]))
def test_tokens_and_masks_are_those_of_real_files(
    source: str, file_format: FileFormat, template: str, embedded_tokenizer: Any, tmp_path: Path, shared: Path
) -> None:
    form = check_rewritten(str(shared / source), file_format, template, embedded_tokenizer, tmp_path)
    assert form == ("as_read" if file_format == "jsonl" else REAL_FORMS[source])


@pytest.mark.parametrize("file_format", FORMATS)
def test_answers_of_nothing_but_an_end_mark_are_none(
    file_format: FileFormat, embedded_tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    ends = str(write_rows([{"prompt": question, "completion": "</s>"} for question in QUESTIONS], "trec.jsonl"))
    check_rewritten(ends, file_format, "alpaca", embedded_tokenizer, tmp_path)


def own(rows: list[dict[str, Any]], write_rows: Callable[..., Path], name: str) -> str:
    return str(write_rows(rows, name))


PAIRS = [{"question": "Who?", "answer": "Tom.", "id": 7}, {"question": "Where?", "answer": "Here.</s>", "id": 8}]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Bern?", "name": "Ann"},
        {"role": "assistant", "content": "One.", "loss_weight": 0},
        {"role": "user", "content": "Now."},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": '{"b": [1]}'}}]},
        {"role": "tool", "content": "sun", "tool_call_id": "1"},
        {"role": "assistant", "content": "Sun."},
    ],
    "tools": [{"name": "w", "parameters": {"type": "object", "properties": {"b": {"default": None}}}}],
}


def said(example: Example) -> Any:
    return (example.messages, example.tools, example.domain, example.is_text)


@pytest.mark.parametrize("file_format", FORMATS)
def test_sources_of_several_forms_become_one_of_messages(
    file_format: FileFormat, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Every field of every message comes back: roles, calls, names, weights, tools."""
    specs = [own(PAIRS, write_rows, "questions.jsonl"), own([CHAT], write_rows, "chats.jsonl")]
    path, form, section = rewrite(specs, tmp_path, file_format, domain={"per_file": True})
    assert form == "messages"
    before = list(read_examples(specs, "data.train", DataSection(domain={"per_file": True})))  # type: ignore[arg-type]
    after = list(read_examples([str(path)], "data.train", section))
    assert [said(e) for e in after] == [said(e) for e in before]
    assert [e.domain for e in after] == ["questions", "questions", "chats"]


def test_rows_of_one_mapping_keep_their_keys_and_values(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    more = [{"question": "Why?", "answer": "Because 😀", "meta": {"a": [1.5, None]}, "note": "half a pair: \ud800"}]
    specs = [own(PAIRS, write_rows, "a.jsonl"), own(more, write_rows, "b.jsonl")]
    path, form, section = rewrite(specs, tmp_path, "jsonl")
    assert form == "as_read" and section.fields == DataSection().fields
    (source,) = expand_sources([str(path)], "data.train")
    assert [dict(row.values) for row in source.read_rows()] == [*PAIRS, *more]


def test_the_file_s_name_becomes_the_domain_of_rows_as_they_are(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    specs = [own(PAIRS, write_rows, "law.jsonl")]
    path, form, section = rewrite(specs, tmp_path, "jsonl", domain={"per_file": True})
    assert form == "as_read" and not section.domain.per_file
    (source,) = expand_sources([str(path)], "data.train")
    assert [dict(row.values) for row in source.read_rows()] == [{**row, "domain": "law"} for row in PAIRS]


def test_a_domain_that_the_rows_have_is_not_written_over(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    specs = [own([{**row, "domain": "own"} for row in PAIRS], write_rows, "law.jsonl")]
    path, form, section = rewrite(specs, tmp_path, "jsonl", domain={"per_file": True})
    assert form == "pair"
    assert [e.domain for e in read_examples([str(path)], "data.train", section)] == ["law", "law"]


@pytest.mark.parametrize("file_format", FORMATS)
def test_fields_that_were_named_are_found_by_themselves_afterwards(
    file_format: FileFormat, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"a": "Who?", "b": "Tom.", "topic": "law", "sys": "Be brief."}]
    named = {"fields": {"instruction": "a", "output": "b", "system": "sys"}, "domain": {"field": "topic"}}
    specs = [own(rows, write_rows, "rows.jsonl")]
    path, _, section = rewrite(specs, tmp_path, file_format, **named)
    (before,) = read_examples(specs, "data.train", DataSection.model_validate(named))
    (after,) = read_examples([str(path)], "data.train", section)
    assert said(after) == said(before)
    assert file_format == "jsonl" or section == DataSection(train=specs)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            {"text": "plain"},
            CHAT,
            r"a.jsonl holds plain texts, .*b.jsonl is read as messages \+ tools: one file cannot",
        ),
        ({**PAIRS[0], "input": "more"}, CHAT, r"a.jsonl, row 1: has the input 'more' .* chats .* have no place"),
        ({**PAIRS[0], "domain": "x"}, PAIRS[1], r"a.jsonl has domains, .*b.jsonl has none: one file cannot"),
    ],
    ids=["texts and chats", "inputs and chats", "domains and none"],
)
def test_what_one_file_cannot_hold_is_refused(
    one: dict[str, Any], other: dict[str, Any], message: str, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    specs = [own([one], write_rows, "a.jsonl"), own([other], write_rows, "b.jsonl")]
    with pytest.raises(DatasetError, match=message):
        rewrite(specs, tmp_path, "jsonl")


def test_values_that_a_format_cannot_hold_name_the_row(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"question": ["Who?"], "answer": ["Tom."], "when": pa.array([0], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "dated.parquet")
    with pytest.raises(DatasetError, match=r"dated.parquet, row 1: JSON cannot hold .* datetime"):
        rewrite([str(tmp_path / "dated.parquet")], tmp_path, "jsonl")
    writer = open_writer(tmp_path / "chat.parquet", "messages", False)
    writer.write(Row("chat.jsonl", 1, {}), {"messages": [{"role": "user", "content": 5}]})
    with pytest.raises(DatasetError, match=r"chat.jsonl, row 1, .*Parquet cannot hold"):
        writer.close()


def test_numbers_that_json_has_no_word_for_become_null_and_are_counted(tmp_path: Path) -> None:
    row = Row("rows.parquet", 1, {})
    values = {"question": "Who?", "score": float("nan"), "more": {"all": [1.5, float("inf")]}, "n": 1}
    with closing(open_writer(tmp_path / "all.jsonl", "as_read", False, {"question"})) as writer:
        writer.write(row, values)
        writer.write(row, {**values, "score": 0.5})
    one, two = (tmp_path / "all.jsonl").read_text().splitlines()
    assert json.loads(one, parse_constant=pytest.fail) == {**values, "score": None, "more": {"all": [1.5, None]}}
    assert json.loads(two)["score"] == 0.5
    assert writer.emptied == {"score": 1, "more": 2}


def test_such_a_number_in_what_is_learned_is_refused(tmp_path: Path) -> None:
    values = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"default": float("nan")}]}
    with (
        closing(open_writer(tmp_path / "all.jsonl", "as_read", False, {"messages", "tools"})) as writer,
        pytest.raises(DatasetError, match=r"rows.jsonl, row 3: 'tools' holds NaN"),
    ):
        writer.write(Row("rows.jsonl", 3, values), values)
