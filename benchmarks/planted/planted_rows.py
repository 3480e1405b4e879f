"""The rows of the planted suite: real data, in characters that the tinystories tokenizer knows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from planted_case import Case, Row, Rows

SHARED = Path(__file__).parents[3] / "shared"
TINYSTORIES = SHARED / "models/tinystories-656k"
T0_TASKS = (
    "common_gen_Example_prompt",
    "commonsense_qa_answer_given_question_without_options",
    "gigaword_generate_summary_for_this",
    "kilt_tasks_hotpotqa_combining_facts",
    "quarel_choose_between",
    "quartz_answer_question_based_on",
)
PATTERN = "Question: {instruction}\nAnswer: {output}"  # the Alpaca template has '#', which this tokenizer lacks
SPELLED = {
    "=": " is ",
    "+": " plus ",
    "*": " times ",
    "/": " over ",
    "%": " percent",
    "&": " and ",
    "(": ", ",
    ")": ",",
}
UNKNOWN = re.compile(r"[^A-Za-z0-9\n !\"$',\-.:;?_]")
LONGEST = 180  # characters of a prompt or an answer: a step takes a tenth of a second
TRAIN, VALIDATION, BATCH = 112, 32, 4
DATA_SETS = ("gsm8k", "roleplay")
RATES = {"gsm8k": 1e-2, "roleplay": 1e-2, "alpaca": 1e-2, "t0": 4e-3}  # near the best of 72 steps, by a sweep


def spell_text(text: str) -> str:
    """The text without characters that the tinystories tokenizer does not know."""
    for mark, word in SPELLED.items():
        text = text.replace(mark, word)
    text = UNKNOWN.sub(" ", text.replace("\u2019", "'"))
    return re.sub(r" *\n\s*", "\n", re.sub(r"[ ]{2,}", " ", text)).strip()


def read_jsonl(path: Path) -> list[Row]:
    """All rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def first_sentences(text: str) -> str:
    """The whole sentences that `LONGEST` characters hold; empty if there is none."""
    ends = [found.end() for found in re.finditer(r"[.!?](?=\s|$)", spell_text(text)[:LONGEST])]
    return spell_text(text)[: ends[-1]] if ends else ""


def clean_rows(rows: Iterable[tuple[str, str]]) -> Rows:
    """Short rows of distinct prompts and answers, spelled."""
    seen: set[str] = set()
    kept: Rows = []
    for prompt, answer in rows:
        row = {"instruction": spell_text(prompt), "output": spell_text(answer)}
        key = row["instruction"].lower()
        if key in seen or not row["output"] or max(map(len, row.values())) > LONGEST:
            continue
        seen.add(key)
        kept.append(row)
    return kept


@cache
def gsm8k() -> tuple[Row, ...]:
    """Grade-school mathematics, calculations spelled out."""
    rows = read_jsonl(SHARED / "data/gsm8k/train.jsonl")
    answers = (re.sub(r"<<.*?>>", "", row["answer"]).replace("####", "The answer is") + "." for row in rows)
    return tuple(clean_rows(zip((row["question"] for row in rows), answers, strict=True)))


@cache
def t0() -> tuple[Row, ...]:
    """Six short tasks of P3, mixed."""
    rows = [row for task in T0_TASKS for row in read_jsonl(SHARED / f"data/t0_per_template/{task}.jsonl")]
    return tuple(clean_rows((row["prompt"], row["completion"].replace("<|endoftext|>", "")) for row in rows))


@cache
def alpaca() -> tuple[Row, ...]:
    """Instructions, with the first sentences of their answers."""
    rows = json.loads((SHARED / "data/llama_factory/alpaca_en_demo.json").read_text(encoding="utf-8"))
    return tuple(clean_rows((f"{r['instruction']} {r['input']}", first_sentences(r["output"])) for r in rows))


@cache
def roleplay() -> tuple[Row, ...]:
    """Instructions to play a role, with the first sentences of their answers."""
    rows = json.loads((SHARED / "data/gpteacher/roleplay.json").read_text(encoding="utf-8"))
    return tuple(clean_rows((f"{r['instruction']} {r['input']}", first_sentences(r["response"])) for r in rows))


ROWS = {"gsm8k": gsm8k, "t0": t0, "alpaca": alpaca, "roleplay": roleplay}


def draw_rows(data_set: str, seed: int, train: int = TRAIN, validation: int = VALIDATION) -> tuple[Rows, Rows]:
    """Disjoint training and validation rows, drawn with the seed."""
    rows = list(ROWS[data_set]())
    random.Random(seed).shuffle(rows)
    chosen = [dict(row) for row in rows[: train + validation]]
    return chosen[: len(chosen) - validation], chosen[len(chosen) - validation :]


def healthy_case(data_set: str, seed: int, scratch: Path) -> Case:
    """The case that kinds are planted in: two epochs at a good rate, all else as the package has it."""
    train, validation = draw_rows(data_set, seed)
    sections = {
        "data": {"template": PATTERN},
        "peft": {"r": 8},
        "training": {"lr": RATES[data_set], "epochs": 2.0, "batch_size": BATCH, "seed": seed},
        "lens": {"report": False},
        "tracking": {"tensorboard": False},
    }
    return Case(data_set, train, validation, TINYSTORIES, sections, seed, scratch)
