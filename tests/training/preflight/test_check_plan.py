"""Planted faults of rows are found before the first step with rows and numbers; healthy rows raise nothing."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.analysis.findings import Finding
from training_lens.data.batching import DataMixture, Schedule
from training_lens.errors import DatasetError
from training_lens.training.preflight.row_checks import count_visits
from training_lens.training.preflight.split_checks import compare_samples

ANIMALS = ("owl", "fox", "hen", "cat", "dog", "bee", "ant", "cow")
PLACES = ("barn", "hall", "wood", "lake", "yard", "mill")
Row = dict[str, Any]
Check = Callable[..., dict[str, Finding]]


def number(i: int) -> int:
    """A number of three digits, another for each i below 900."""
    return 100 + i * 577 % 900


def rows(count: int, start: int = 0, **more: Any) -> list[Row]:
    """Questions that are all different, each with an answer of its own."""
    return [
        {
            "question": f"Where did the {ANIMALS[i % 8]} of farm {number(i)} sleep {'last night' if i % 3 else 'now'}?",
            "answer": f"It slept in the {PLACES[i * 5 % 6]} behind house {number(i + 450)}.",
            **more,
        }
        for i in range(start, start + count)
    ]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    def find(train: list[Row], validation: list[Row] | None = None, **sections: Any) -> dict[str, Finding]:
        data = {"train": train, **({"validation": validation} if validation else {}), **sections.pop("data", {})}
        output = {"base_output_dir": str(tmp_path / "outputs")}
        plan = TrainingWrapper(TrainingConfig.model_validate({"data": data, "output": output, **sections})).plan()
        return {finding.code: finding for finding in plan.findings}

    return find


def severities(found: dict[str, Finding]) -> dict[str, str]:
    return {code: f.severity for code, f in found.items() if f.severity not in ("fine", "note")}


def test_healthy_rows_raise_nothing(check: Check) -> None:
    found = check(rows(120), rows(40, 120))
    assert severities(found) == {} and len(found) == 10
    assert all(f.signature and f.threshold and f.source and f.measured for f in found.values())


def test_leaks_of_every_kind_are_counted_apart(check: Check) -> None:
    train = rows(60)
    long = (
        "Once there was a small owl that lived alone in a tall tree by the river, and at night it hunted mice, until "
        "one day it met an old fox who knew each path through the wood, and who told it of a barn with many more."
    )
    train.append({"question": long, "answer": "It was a happy owl."})
    same, spaced, other = train[3], train[4], train[5]
    held = [
        {**same, "question": f"{same['question']} "},
        {"question": f"So, {spaced['question'].upper()}", "answer": spaced["answer"].lower()},
        {**other, "answer": "Nobody knows."},
        {"question": long.replace("mice", "rats"), "answer": "It was a happy owl."},
        *rows(40, 200),
    ]
    leaks = check(train, held)["leaks"]
    assert leaks.severity == "warning" and leaks.confidence == "sure"
    assert {kind: leaks.evidence[kind] for kind in ("exact", "normalized", "question", "near")} == dict.fromkeys(
        ("exact", "normalized", "question", "near"), 1
    )
    assert (leaks.evidence["rows"], leaks.evidence["of"]) == (4, 44)
    assert [each["other"].rsplit(":", 1)[1] for each in leaks.evidence["examples"]] == ["4", "5", "6", "61"]
    assert "1 the same question with another answer" in leaks.measured and "prepare" in leaks.action


def test_a_validation_set_that_leaks_in_whole_is_refused(check: Check) -> None:
    train = rows(30)
    held = [{"question": row["question"].lower(), "answer": f"{row['answer']} "} for row in train[:12]]
    with pytest.raises(DatasetError, match=r"all 12 validation examples are training examples too.*but for case"):
        check(train, held)


def test_duplicates_are_given_as_the_epochs_that_they_amount_to(check: Check) -> None:
    found = check(rows(30) * 8, training={"epochs": 2})["duplicates"]
    assert found.severity == "warning" and found.evidence["distinct"] == 30
    assert found.evidence["share"] == pytest.approx(7 / 8) and found.evidence["visits"] == pytest.approx(16)
    assert "train-" in found.evidence["rows"][0]["repeats"]


@pytest.mark.slow
def test_so_are_weights_above_1(check: Check, write_rows: Callable[..., Path]) -> None:
    files = [str(write_rows(rows(30), "a.jsonl")), str(write_rows(rows(30, 30), "b.jsonl"))]
    often = check(files, data={"weights": [9, 1]}, training={"epochs": 2})["duplicates"]
    assert often.severity == "warning" and "by data.weights" in often.measured
    assert often.evidence["visits"] == pytest.approx(10, rel=0.05) and often.evidence["most_visits"] > 17
    assert check(files, data={"weights": [1, 1]}, training={"epochs": 2})["duplicates"].severity == "fine"


def test_planted_canaries_are_no_repeated_rows(check: Check) -> None:
    found = check(rows(30), data={"canaries": 2, "canary_repeats": [1, 8]})["duplicates"]
    assert found.severity == "fine" and found.measured.startswith("30 rows are 30 different ones")
    both = check(rows(30) * 2, data={"canaries": 2, "canary_repeats": [1, 8]})["duplicates"]
    assert both.measured.startswith("60 rows are 30 different ones") and "canary" not in both.measured


def test_visits_are_those_of_the_schedule() -> None:
    mix = DataMixture(np.array([0, 0, 1]), (2.0, 1.0))
    schedule = Schedule(3, global_batch=5, epochs=3, max_steps=None, seed=0, mix=mix)
    assert schedule.total_steps == 3 and count_visits(schedule).tolist() == [6.0, 6.0, 3.0]


def test_different_answers_to_one_prompt(check: Check) -> None:
    train = rows(40)
    found = check([*train, *({**row, "answer": "Nobody knows."} for row in train[:10])])["label_disagreement"]
    assert found.severity == "warning" and found.evidence["share"] == pytest.approx(20 / 50)
    assert found.evidence["least_loss"] > 0 and "Nobody knows." in found.measured
    by_domain = [*rows(40, domain="a"), *({**row, "answer": "No.", "domain": "b"} for row in train)]
    assert check(by_domain)["label_disagreement"].severity == "fine"  # the prompt says the domain


@pytest.mark.slow
def test_supervised_prompts_and_chats_as_plain_texts(check: Check) -> None:
    found = check(rows(20), data={"mask_prompt": False})["prompt_supervised"]
    assert found.severity == "note" and "data.mask_prompt=false" in found.title
    texts = [{"text": f"### Instruction:\n{row['question']}\n\n### Response:\n{row['answer']}"} for row in rows(20)]
    found = check(texts)["prompt_supervised"]
    assert found.severity == "warning" and "It slept in the barn" in found.evidence["rows"][0]["learned"]
    assert check([{"text": row["answer"]} for row in rows(20)])["prompt_supervised"].severity == "fine"


@pytest.mark.slow
def test_answers_without_an_end_token(check: Check) -> None:
    long = [{**row, "answer": " ".join([row["answer"]] * 9)} for row in rows(10)]
    cut = {"data": {"truncation": "keep_start"}, "model": {"seq_len": 96}}
    found = check([*rows(30, 10), *long], **cut)["end_token"]
    assert found.severity == "warning" and found.evidence["share"] == pytest.approx(10 / 40)
    assert check(rows(40), **cut)["end_token"].severity == "fine"


@pytest.mark.slow
def test_truncated_answers_name_the_length_that_keeps_them(check: Check) -> None:
    long = [{"question": "Say it.", "answer": " ".join(["It slept in the barn."] * (20 + i))} for i in range(10)]
    found = check([*rows(40), *long], model={"seq_len": 96})["truncated"]
    assert found.severity == "warning" and found.evidence["answers_truncated"] == 10
    whole = check([*rows(40), *long], model={"seq_len": found.evidence["seq_len_for_99_percent"]})["truncated"]
    assert whole.evidence["answers_truncated"] <= 1


def test_lost_characters_are_shown(check: Check, shared: Path) -> None:
    train = [{**row, "answer": f"{{ {row['answer']} }} @ home"} for row in rows(20)]
    found = check(train, model={"id": str(shared / "models/tinystories-656k")})
    assert found["unknown_characters"].severity == "warning"
    assert "'@' (20)" in found["unknown_characters"].measured


@pytest.mark.slow
def test_domains_too_small_to_be_measured(check: Check) -> None:
    train = [*rows(60, domain="a"), *rows(60, 60, domain="b")]
    found = check(train, [*rows(30, 200, domain="a"), *rows(3, 300, domain="b")])["small_domains"]
    assert found.severity == "warning" and found.evidence["domains"] == {"b": 3}
    even = [*rows(15, 200, domain="a"), *rows(15, 300, domain="b")]
    assert check(train, even)["small_domains"].severity == "fine"


@pytest.mark.parametrize(
    "held",
    [
        {"question": "Where did it sleep?", "answer": " ".join(["It slept in the barn."] * 6)},
        {"question": "Where did the owl sleep?", "answer": "1 2 3 4 5 6 7"},
    ],
    ids=["longer", "other words"],
)
def test_validation_rows_of_another_kind(check: Check, held: Row) -> None:
    others = [{**held, "question": f"{held['question']} {i}"} for i in range(60)]
    found = check(rows(120), others)["validation_unlike"]
    assert found.severity == "warning" and "answer" in found.measured
    assert check(rows(120), rows(60, 120))["validation_unlike"].severity == "fine"


def test_samples_of_one_kind_are_rarely_far_apart() -> None:
    rng = np.random.default_rng(1)
    found = [compare_samples(rng.normal(size=60), rng.normal(size=300)) for _ in range(1000)]
    assert not any(each.is_large for each in found)
    assert np.mean([each.p < 0.05 for each in found]) < 0.08
    assert compare_samples(rng.normal(size=60), 1 + rng.normal(size=300)).is_large


def test_findings_are_plain_values(check: Check) -> None:
    found = check(rows(20) * 3, rows(5, 30))
    assert all(json.loads(json.dumps(dict(f.evidence))) is not None for f in found.values())


def test_rows_of_random_letters_are_shown(check: Check) -> None:
    """Among sentences; numbers and a rare other language are no random letters."""
    drawn = random.Random(0)
    letters = string.ascii_letters + string.digits
    keys = [{"question": f"Which key is {i}?", "answer": "".join(drawn.choices(letters, k=60))} for i in range(6)]
    found = check([*rows(120), *keys])["random_text"]
    assert found.severity == "warning" and found.measured.startswith("6 of 126 answers")
    assert {row["row"].rsplit(":", 1)[1] for row in found.evidence["rows"]} <= {str(i) for i in range(121, 127)}
    sums = [
        {"question": f"Sum {i}?", "answer": f"{number(i)} + {number(i + 7)} = {number(i) + number(i + 7)}, right"}
        for i in range(6)
    ]
    german = [
        {"question": f"Wo {i}?", "answer": f"Es schlief in der Scheune neben dem Haus Nummer {number(i)}."}
        for i in range(6)
    ]
    assert check([*rows(120), *sums, *german])["random_text"].severity == "fine"
    assert check([*rows(400), *keys[:1]])["random_text"].severity == "note"
