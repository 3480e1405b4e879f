"""The sections on rows: what they are, how they become text, and how files of them are prepared."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from training_lens import embedded
from training_lens.config.section import Names, Paths, Place, Rows, Section, setting
from training_lens.utils.formatting import did_you_mean

TEMPLATES = ("auto", "chat", "alpaca", "plain")


class FieldsSection(Section):
    """Which keys of a row mean what; null: found by looking, and reported.

    A dotted key leads into objects, and of lists into the first item: 'answers.text'.
    """

    instruction: str | None = setting(None, "key of the prompt, such as 'question'")
    input: str | None = setting(None, "key of the prompt's second part, such as 'context'")
    output: str | None = setting(None, "key of the answer that is learned, such as 'response'")
    system: str | None = setting(None, "key of the system message")
    history: str | None = setting(None, "key of earlier turns: pairs of prompt and answer, or messages")
    messages: str | None = setting(None, "key of a chat: a list of {role, content} or {from, value}")
    tools: str | None = setting(None, "key of the tools that may be called, a list or its JSON text")
    label: str | None = setting(None, "key that says whether an answer is wanted; false: it is not learned")
    text: str | None = setting(None, "key of plain text, learned whole and without a template")


CSV_CHARACTERS = {
    "comma": ",",
    "semicolon": ";",
    "tab": "\t",
    "\\t": "\t",
    "pipe": "|",
    "space": " ",
    "backslash": "\\",
}


class CsvSection(Section):
    """How tables of text (.csv, .tsv) are written; null: detected and logged."""

    delimiter: str | None = setting(
        None, "the delimiter of cells: one character, or comma, semicolon, tab, pipe, space"
    )
    encoding: str | None = setting(None, "such as utf-8, cp1252, cp1251, utf-16, shift_jis, gb18030")
    quotechar: str | None = setting(
        '"', "what stands around text that holds a delimiter; null: none, quotation marks are plain text"
    )
    escapechar: str | None = setting(
        None, "what stands before a quotation mark within quoted text, such as backslash; null: it is doubled"
    )

    @field_validator("delimiter", "quotechar", "escapechar")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        value = CSV_CHARACTERS.get(value.lower(), value) if value is not None else None
        if value is not None and (len(value) != 1 or value in "\r\n"):
            raise ValueError(f"{value!r} is not one character; give one, or {', '.join(CSV_CHARACTERS)}")
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            "".encode(value or "utf-8")
        except LookupError:
            raise ValueError(
                f"'{value}' is no text encoding that Python knows; such are utf-8, cp1252, cp1251, utf-16, shift_jis"
            ) from None
        return value

    @model_validator(mode="after")
    def _different_characters(self) -> CsvSection:
        given = [c for c in (self.delimiter, self.quotechar, self.escapechar) if c is not None]
        if len(set(given)) < len(given):
            raise ValueError("data.csv: delimiter, quotechar and escapechar must be different characters")
        return self


class DomainSection(Section):
    """Domain conditioning: a prefix on the prompt that says where a row belongs."""

    field: str | None = setting("auto", "key that holds the domain; auto: 'domain' where rows have it")
    per_file: bool = setting(False, "the file's name without its ending is the domain of its rows")
    style: Literal["tag", "hash", "raw", "none"] = setting(
        "tag",
        "tag: '[domain: law] '; hash: a stable 8-digit hash of it, '[3f2a90bc] '; raw: its value alone, "
        "'law '; none: no prefix",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> DomainSection:
        if self.per_file and self.field not in (None, "auto"):
            raise ValueError(
                "data.domain.field and data.domain.per_file both say where the domain comes from; keep one"
            )
        return self


class DataSection(Section):
    """Training and validation rows, and how they become text."""

    train: Rows = setting(
        [embedded.TRAIN],
        "paths or globs (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, each also .gz), folders saved by "
        "datasets, hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT], merged; or rows: a list, or from Python a table",
    )
    weights: list[Annotated[float, Field(gt=0)]] | None = setting(
        None,
        "how often an epoch takes the rows of each entry of data.train: 2 is twice, 0.5 a random half, "
        "drawn anew each epoch; null: once",
    )
    validation: Rows | None = setting(
        None, "like train, each file reported; null: the embedded held-out rows for the embedded set"
    )
    val_ratio: float = setting(
        0.0, "share of the training rows held out at random when validation is not given", ge=0.0, lt=1.0
    )
    fields: FieldsSection = FieldsSection()
    ignore_keys: Paths = setting(
        [],
        "keys of rows to train without, though they look as if they were meant: 'weight', "
        "'messages[].reasoning_content'",
    )
    csv: CsvSection = CsvSection()
    on_bad_row: Literal["error", "skip"] = setting(
        "error",
        "rows that cannot be read or used: error names all of them and ends; skip leaves them out, and "
        "lists them in the run's metadata/data.json",
    )
    template: Place = setting(
        "auto",
        "chat: the tokenizer's chat template; alpaca; plain: the row's texts alone; auto: chat where the "
        "tokenizer has one, else alpaca; a .jinja file; or a pattern such as 'Q: {instruction}\\nA: {output}'",
        min_length=1,
    )
    date: str | None = setting(
        None,
        "the date that a chat template writes as today's, as YYYY-MM-DD; null: the day on which the run "
        "starts, which the run keeps",
    )
    domain: DomainSection = DomainSection()
    mask_prompt: bool = setting(True, "learn the answer alone; false: the prompt's tokens as well")
    supervise: Literal["auto", "all", "last"] = setting(
        "auto",
        "auto: learn every answer of a chat, but not those of `history` or of a prompt that is a chat; "
        "all: those, too; last: the last answer alone",
    )
    thinking: bool = setting(
        False, "answers hold thoughts (<think>...</think>) that the chat template knows: learn them, too"
    )
    truncation: Literal["keep_end", "keep_start", "drop"] = setting(
        "keep_end",
        "rows longer than model.seq_len: keep_end cuts the start (the answer keeps its end), keep_start "
        "cuts the end, drop leaves them out",
    )
    special_tokens: Literal["plain", "allow"] = setting(
        "plain", "text of a special token inside a row, such as '<|im_end|>': plain text, or the token"
    )
    new_tokens: Names = setting(
        [],
        "texts that become one token each, such as the tags of tool calls: their rows of embedding and output head "
        "start as the mean of their pieces' rows, and are trained and saved with the adapter",
    )
    strip_end_marks: bool = setting(True, "take a literal end mark such as '<|endoftext|>' off the end of answers")
    answer_in_prompt: Literal["refuse", "allow"] = setting(
        "refuse",
        "rows whose prompt already says the answer, where most rows of a source are such: refuse the source, or allow "
        "it (copying is the task)",
    )
    max_examples: int | None = setting(
        None, "at most this many training examples, drawn at random with the seed; null: all", ge=1
    )
    exclude: Place | None = setting(
        None,
        "file of ids of rows of data.train, one a line ('rows.jsonl:17'), that are neither trained on nor held out, "
        "such as the suspects of training-lens explain rows; null: none",
        min_length=1,
    )
    canaries: int = setting(
        0,
        "made-up rows with a random code to plant among the training rows for each number of data.canary_repeats, for "
        "training-lens explain memory: the adapter may then say them; 0: none",
        ge=0,
        le=1000,
    )
    canary_repeats: list[Annotated[int, Field(ge=1, le=1000)]] = setting(
        [1, 4, 16], "how often an epoch visits each canary, by group", min_length=1
    )

    @field_validator("template")
    @classmethod
    def _known_template(cls, value: str) -> str:
        if value in TEMPLATES or value.endswith((".jinja", ".jinja2", ".j2")):
            return value
        if "{" not in value and "\n" not in value:
            raise ValueError(
                f"'{value}' is no template; give one of {', '.join(TEMPLATES)}, a .jinja file, or a pattern with "
                f"{{instruction}} and {{output}}.{did_you_mean(value, TEMPLATES)}"
            )
        return value

    @field_validator("new_tokens")
    @classmethod
    def _distinct_tokens(cls, value: list[str]) -> list[str]:
        if wide := [text for text in value if text != text.strip()]:
            raise ValueError(f"{wide[0]!r} begins or ends with white space, which belongs to the text around; strip it")
        if twice := [text for text, count in Counter(value).items() if count > 1]:
            raise ValueError(f"{twice[0]!r} is given {value.count(twice[0])} times; give each token once")
        return value

    @field_validator("date", mode="before")
    @classmethod
    def _is_day(cls, value: Any) -> Any:
        text = value.isoformat() if type(value) is date else value  # YAML reads a bare date as one
        with suppress(TypeError, ValueError):
            if text is None or date.fromisoformat(text).isoformat() == text:
                return text
        raise ValueError(f"{text!r} is no date; give one as YYYY-MM-DD, such as 2026-03-31")

    @model_validator(mode="after")
    def _check_sources(self) -> DataSection:
        if not self.train:
            raise ValueError("data.train: no rows and no paths; give at least one")
        if self.validation is not None and self.val_ratio:
            raise ValueError("data.validation and data.val_ratio are both given; keep one")
        entries = 1 if isinstance(self.train[0], dict) else len(self.train)  # rows in memory are one entry
        if self.weights is not None and len(self.weights) != entries:
            raise ValueError(
                f"data.weights: {len(self.weights)} weights for {entries} entries of data.train; give one each"
            )
        return self

    @property
    def validation_sources(self) -> list[str] | list[dict[str, Any]]:
        """The validation rows or paths; those of the embedded set where that is what is trained on."""
        if self.validation is None and not self.val_ratio and self.train == [embedded.TRAIN]:
            return [embedded.HELDOUT]
        return self.validation or []


class PrepareSection(Section):
    """What `training-lens prepare` makes of the rows of data.train."""

    output: Place | None = setting(
        None, "folder to write; null: {base_output_dir}/data/{experiment_name}", min_length=1
    )
    format: Literal["jsonl", "parquet"] = setting(
        "jsonl", "jsonl: the rows as they are; parquet: what is learned of them, in columns of one type"
    )
    deduplicate: Literal["none", "exact", "near"] = setting(
        "exact",
        "keep the first of rows that say the same (exact: but for white space), or ask and answer nearly "
        "the same (near: rows that differ in one number may be, too)",
    )
    near_threshold: float = setting(
        0.8, "near are texts that share this part of their 5-word pieces (Jaccard)", ge=0.5, le=1.0
    )
    num_perm: int = setting(128, "MinHash permutations a row; more find near rows more surely", ge=16, le=1024)
    splits: dict[str, Annotated[float, Field(gt=0, le=1)]] = setting(
        {"train": 0.9, "validation": 0.1}, "name and share of each file; 'train' is one, the sum is 1"
    )
    split_by: Literal["random", "domain", "group"] = setting(
        "random", "random; domain: every domain has its share in every split; group: rows of one group stay together"
    )
    group_field: str | None = setting(
        None, "key of a row that names its group, such as 'user_id', for split_by=group", min_length=1
    )
    leakage: Literal["check", "remove", "off"] = setting(
        "check",
        "rows that say the same, nearly the same, or ask the same in two splits: report, or also remove "
        "from the training split",
    )
    seed: int = setting(0, "of the split", ge=0, lt=2**31)

    @field_validator("splits")
    @classmethod
    def _check_shares(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = [name for name in value if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]
        if wrong:
            raise ValueError(f"'{wrong[0]}' cannot name a file; use letters, digits, '-' and '_'")
        if "train" not in value:
            raise ValueError(f"there is no 'train' among {', '.join(value) or 'none'}; name the training split so")
        if abs(sum(value.values()) - 1) > 1e-6:
            raise ValueError(f"the shares sum to {sum(value.values()):g}, expected 1")
        return value

    @model_validator(mode="after")
    def _check_group_field(self) -> PrepareSection:
        if self.split_by == "group" and self.group_field is None:
            raise ValueError("prepare.split_by: group needs the key that names a row's group; give prepare.group_field")
        if self.split_by != "group" and self.group_field is not None:
            raise ValueError(
                f"prepare.group_field: split_by={self.split_by} looks at no group; give prepare.split_by=group"
            )
        return self
