"""Planted runs get the verdict that they deserve: trained for it, or built by hand on the embedded model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.data.examples import Example, Message
from training_lens.evaluation.run_evaluation import BrokenAdapterError, ModelEvaluator
from training_lens.evaluation.training_verdict import assess_training, read_training_record
from training_lens.evaluation.verdict import Verdict
from training_lens.inference.heldout_examples import validation_examples
from training_lens.inference.session import Session, open_run, open_session
from training_lens.runs.run_folder import RunFolder

ALL = EvaluationSection(max_new_tokens=24, resamples=200)
LOSSES = EvaluationSection(generate=False, controls=False, resamples=200)
ANSWERS = EvaluationSection(max_new_tokens=24, controls=False, resamples=50)
ANIMALS = "owl fox hare toad wren swan dove goat mole newt crow lynx deer wolf bear seal moth frog duck hawk".split()
PLACES = "hall barn shop field lake forest".split()


def rows(pairs: Sequence[tuple[str, str]], domain: str | None = None) -> list[Example]:
    return [
        Example((Message("user", q), Message("assistant", a)), domain, "planted.jsonl", i + 1)
        for i, (q, a) in enumerate(pairs)
    ]


def codes(verdict: Verdict) -> dict[str, str]:
    return {remark.code: remark.severity for remark in verdict.remarks}


def evaluate(session: Session, examples: Sequence[Example], settings: EvaluationSection) -> Verdict:
    verdict = ModelEvaluator(session, settings).compare(examples).verdict
    assert verdict is not None and verdict.sentence == verdict.text_lines()[0]
    return verdict


@pytest.fixture(scope="module")
def good(embedded_run: RunFolder) -> Session:
    return open_run(embedded_run)


@pytest.fixture(scope="module")
def held_out(embedded_run: RunFolder, good: Session) -> list[Example]:
    return validation_examples(embedded_run, good, 30)


@pytest.fixture(scope="module")
def by_hand(embedded_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Session]:
    """The good adapter with its B multiplied: by 0 it does nothing, by much it is ruined, by more it overflows."""

    def build(factor: float) -> Session:
        folder = tmp_path_factory.mktemp("adapter")
        (folder / "adapter_config.json").write_bytes((embedded_run.adapter / "adapter_config.json").read_bytes())
        tensors = load_file(embedded_run.adapter / "adapter_model.safetensors")
        scaled = {name: t * factor if "lora_B" in name else t for name, t in tensors.items()}
        save_file({name: t.contiguous() for name, t in scaled.items()}, folder / "adapter_model.safetensors")
        return open_session(TrainingConfig.model_validate({"inference": {"adapter": str(folder)}}))

    return build


@pytest.fixture(scope="module")
def ruined(by_hand: Callable[[float], Session]) -> Session:
    return by_hand(60.0)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    """A short run on planted rows, validated on others."""

    def run(trained: Sequence[tuple[str, str]], validated: Sequence[tuple[str, str]], **training: Any) -> RunFolder:
        folder = tmp_path_factory.mktemp("planted")
        for name, pairs in (("train", trained), ("validation", validated)):
            lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        config = TrainingConfig.model_validate(
            {
                "data": {name: [str(folder / f"{name}.jsonl")] for name in ("train", "validation")},
                "training": {"batch_size": 8, "lr": 5e-3, **training},
                "peft": {"r": 8},
                "lens": {"enabled": False},
                "tracking": {"tensorboard": False},
                "output": {"base_output_dir": str(folder / "outputs")},
            }
        )
        return RunFolder(Path(TrainingWrapper(config).train().run_dir))

    return run


def test_a_good_run_is_better_uses_its_prompt_and_names_the_next_command(
    good: Session, held_out: list[Example]
) -> None:
    verdict = evaluate(good, held_out, ALL)
    assert verdict.outcome == "better" and verdict.measure == "loss"
    assert verdict.interval is not None and verdict.change is not None
    assert verdict.interval[0] < verdict.change < verdict.interval[1] < 0
    assert codes(verdict)["prompt_used"] == "fine" and "thin_evidence" not in codes(verdict)
    assert verdict.next_command.startswith("training-lens ") and good.source in verdict.next_command


@pytest.mark.parametrize(
    ("rows", "outcome", "expected"),
    [
        (slice(12), "better", {"thin_evidence"}),
        (slice(4), "inconclusive", {"thin_evidence"}),
        ([0, 1, 2, 3] * 10, "inconclusive", {"repeated_rows", "thin_evidence"}),
    ],
    ids=["twelve", "four", "the same four again and again"],
)
def test_few_rows_are_thin_evidence_and_the_same_again_are_no_more(
    rows: Any, outcome: str, expected: set[str], good: Session, held_out: list[Example]
) -> None:
    verdict = evaluate(good, held_out[rows] if isinstance(rows, slice) else [held_out[i] for i in rows], LOSSES)
    assert verdict.outcome == outcome and expected == set(codes(verdict)) - {"domains_part"}
    assert verdict.severity == "warning" and ("at least 6 rows" in verdict.decide) == (outcome == "inconclusive")


def test_an_adapter_that_does_nothing_makes_no_difference(
    by_hand: Callable[[float], Session], held_out: list[Example]
) -> None:
    verdict = evaluate(by_hand(0.0), held_out, LOSSES)
    assert verdict.outcome == "no difference" and "the same probability" in verdict.sentence
    assert verdict.change == 0.0 and verdict.severity != "fine"


@pytest.mark.slow
def test_a_ruined_adapter_is_worse_and_loops_without_end(ruined: Session, held_out: list[Example]) -> None:
    verdict = evaluate(ruined, held_out[:10], ANSWERS)
    assert verdict.outcome == "worse" and verdict.severity == "problem"
    assert {"never_ends", "loops"} <= set(codes(verdict))


def test_an_adapter_of_no_numbers_is_worse(by_hand: Callable[[float], Session], held_out: list[Example]) -> None:
    with pytest.raises(BrokenAdapterError, match="Worse: the loss of the adapter is not finite on 6 of 6") as broken:
        evaluate(by_hand(1e30), held_out[:6], LOSSES)
    assert broken.value.verdict.severity == "problem"


@pytest.mark.slow
def test_a_model_that_knows_no_end_never_ends(good: Session, held_out: list[Example]) -> None:
    room = EvaluationSection(controls=False, resamples=50)
    verdict = evaluate(replace(good, stop_ids=frozenset()), held_out[:8], room)
    assert codes(verdict)["never_ends"] == "problem" and "8 of 8 answers of the adapter do not end" in verdict.sentence


@pytest.mark.slow
def test_answers_cut_by_the_users_limit_do_not_tell_whether_they_would_end(
    good: Session, held_out: list[Example]
) -> None:
    verdict = evaluate(good, held_out[:8], EvaluationSection(max_new_tokens=2, resamples=50, controls=False))
    assert "never_ends" not in codes(verdict) and codes(verdict)["cut_short"] == "note"


@pytest.mark.slow
def test_two_runs_are_called_by_their_names(good: Session, ruined: Session, held_out: list[Example]) -> None:
    result = ModelEvaluator(good, LOSSES).compare_with(ModelEvaluator(ruined, LOSSES), held_out[:12])
    assert result.verdict is not None and result.verdict.outcome == "better"
    names = Path(good.source).name, Path(ruined.source).name
    assert result.verdict.sentence.startswith(f"{names[0]} is better than {names[1]} by loss")
    assert result.comparison.labels == {"base": names[1], "adapter": names[0]}
    again = ModelEvaluator(ruined, LOSSES).compare_with(ModelEvaluator(good, LOSSES), held_out[:12]).verdict
    assert again is not None and again.outcome == "worse"


@pytest.mark.slow
def test_a_base_that_is_right_already_and_a_domain_that_is_lost_are_said(
    good: Session, held_out: list[Example]
) -> None:
    asked = [example for example in held_out if example.domain == "forest"]
    said = ModelEvaluator(good, ANSWERS).evaluate(asked, base=True).outcomes["base"].answers
    known = [
        replace(e, messages=(*e.messages[:-1], Message("assistant", text.strip())))
        for e, text in zip(asked, said, strict=True)
    ]
    perfect = evaluate(good, known, ANSWERS)
    assert codes(perfect)["base_perfect"] == "note" and perfect.outcome != "better"
    both = evaluate(good, [*known, *(replace(e, domain="hill") for e in asked)], LOSSES)
    parted = next(remark.sentence for remark in both.remarks if remark.code == "domains_part")
    assert parted == "By domain: better on hill; worse on forest."


@pytest.mark.slow
def test_a_run_on_one_answer_ignores_its_prompt(train: Callable[..., RunFolder]) -> None:
    drawn = random.Random(0)
    asked = [(f"Where is the {a} number {drawn.randrange(90)}?", "Come in and sit down.") for a in ANIMALS * 4]
    settings = EvaluationSection(generate=False, resamples=200)
    verdict = evaluate(open_run(train(asked[:48], asked[48:])), rows(asked[48:]), settings)
    assert verdict.outcome == "better" and codes(verdict)["prompt_ignored"] == "problem"
    assert "but it ignores its prompt" in verdict.sentence and verdict.severity == "problem"


@pytest.mark.slow
def test_a_run_on_wrong_answers_is_worse_and_its_training_says_so(train: Callable[..., RunFolder]) -> None:
    asked = [f"Is the {a} in the {p}?" for p in PLACES for a in ANIMALS]
    wrong = [(q, "Never, not at all.") for q in asked[:48]]
    right = [(q, "The mouse lives in the field.") for q in asked[80:]]
    run = train(wrong, right, epochs=3, lr=1e-2)
    at_the_end = assess_training(read_training_record(run), str(run.root))
    verdict = evaluate(open_run(run), rows(right), LOSSES)
    assert at_the_end.outcome == verdict.outcome == "worse" and verdict.severity == at_the_end.severity == "problem"
    assert "without an interval" in at_the_end.sentence and "compare --run" in at_the_end.next_command


@pytest.mark.slow
def test_rows_learned_by_heart_are_told_from_rows_that_carry_over(train: Callable[..., RunFolder]) -> None:
    drawn = random.Random(1)

    def told(count: int) -> list[tuple[str, str]]:
        return [(f"Code of {drawn.choice(ANIMALS)} {i}?", f"{drawn.randrange(10**6)}") for i in range(count)]

    trained, others = told(6), told(30)
    run = train(trained, others, epochs=40, lr=1e-2, eval_steps=8)
    verdict = evaluate(open_run(run), rows(others), LOSSES)
    assert codes(verdict)["memorized"] == "warning" and verdict.severity != "fine"
