"""A verdict says what its interval tells and no more; measures that disagree are both named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from training_lens.errors import ConfigurationError
from training_lens.evaluation.answer_endings import Endings
from training_lens.evaluation.comparison import ControlResult, ModelComparison, RowGroup
from training_lens.evaluation.comparison_verdict import assess_comparison, prompt_remark
from training_lens.evaluation.metrics import AnswerScoring
from training_lens.evaluation.own_metrics import AnswerMetric
from training_lens.evaluation.training_verdict import TrainingRecord, assess_training, build_training_record
from training_lens.evaluation.verdict import MeasuredChange, Remark, Verdict

NAMES = ("the adapter", "its base")
Changes = Mapping[str, tuple[float, float, tuple[float, float] | None]]
BETTER_LOSS = {"loss": (3.0, 2.0, (-1.2, -0.8))}


def group(changes: Changes, rows: int = 200) -> RowGroup:
    base = {name: before for name, (before, _, _) in changes.items()}
    adapter = {name: after for name, (_, after, _) in changes.items()}
    delta = {name: after - before for name, (before, after, _) in changes.items()}
    intervals = {name: interval for name, (_, _, interval) in changes.items() if interval}
    return RowGroup(rows, 10 * rows, {"base": base, "adapter": adapter}, delta, intervals)


def assess(changes: Changes, rows: int = 200, **options: Any) -> Verdict:
    own = {metric.name: metric for metric in options.pop("own", [])}
    moved = options.pop("moved", True)
    parts = {name: group(part, count) for name, (part, count) in options.pop("domains", {}).items()}
    settings = {"decide_by": None, "distinct_rows": rows, "run": "runs/a b"} | {
        name: options.pop(name) for name in ("decide_by", "distinct_rows", "training", "run") if name in options
    }
    whole = group(changes, rows)
    shown: Any = ("a row",) if moved else ()
    comparison = ModelComparison({}, whole, {}, parts, 0.95, improved=shown, **options)
    return assess_comparison(comparison, AnswerScoring(own=own), **settings)


@pytest.mark.parametrize(
    ("measure", "before", "interval", "outcome"),
    [
        ("loss", 3.0, (-0.5, -0.1), "better"),
        ("loss", 3.0, (0.1, 0.5), "worse"),
        ("loss", 3.0, (-0.5, 0.1), "inconclusive"),
        ("loss", 3.0, (-0.02, 0.01), "no difference"),
        ("loss", 3.0, (-0.02, -0.01), "no difference"),  # beyond chance, and too little to matter
        ("loss", 3.0, (-0.5, -0.01), "better"),
        ("loss", 3.0, None, "inconclusive"),
        ("exact_match", 0.5, (0.05, 0.1), "better"),
        ("exact_match", 0.5, (-0.1, -0.05), "worse"),
        ("exact_match", 0.5, (-0.01, 0.01), "no difference"),
        ("exact_match", 0.0, (0.0, 0.0), "no difference"),  # none of 200
        ("chrf", 50.0, (-0.5, 0.5), "no difference"),
        ("bits_per_byte", 1.0, (-0.5, -0.1), "better"),
    ],
)
def test_the_outcome_is_where_the_interval_lies(
    measure: str, before: float, interval: tuple[float, float] | None, outcome: str
) -> None:
    lower = measure in ("loss", "bits_per_byte")
    middle = sum(interval) / 2 if interval else 0.0
    change = MeasuredChange(measure, before, before + middle, interval, 200, lower_is_better=lower)
    assert change.outcome() == outcome


def test_no_right_answer_among_ten_is_no_proof_that_there_is_no_difference() -> None:
    assert MeasuredChange("exact_match", 0, 0, (0.0, 0.0), 10, lower_is_better=False).outcome() == "inconclusive"


def test_five_rows_decide_nothing_and_the_number_of_rows_that_would_is_named() -> None:
    few = assess({"loss": (3.0, 2.0, (-1.1, -0.9))}, rows=5)
    assert few.outcome == "inconclusive" and few.decide.startswith("at least 6 rows")
    unsure = assess({"loss": (3.0, 2.8, (-0.6, 0.2))}, rows=100)
    assert unsure.outcome == "inconclusive" and unsure.decide.startswith("about 400 rows")
    assert unsure.next_command == "training-lens compare --run 'runs/a b' data.validation=FILE"


@pytest.mark.parametrize("other", ["exact_match", "numeric", "json_fields"])
def test_measures_that_disagree_are_both_named_and_the_user_decides(other: str) -> None:
    changes: Changes = {**BETTER_LOSS, other: (0.5, 0.3, (-0.3, -0.1))}
    verdict = assess(changes)
    assert verdict.outcome == "inconclusive" and f"evaluation.decide_by={other}" in verdict.decide
    assert "better than its base by loss" in verdict.sentence
    assert f"worse by {other.replace('_', ' ')}" in verdict.sentence
    assert verdict.next_command == f"training-lens compare --run 'runs/a b' evaluation.decide_by={other}"
    chosen = assess(changes, decide_by=other)
    assert chosen.outcome == "worse" and "By loss it is better" in chosen.text_lines()[1]
    by_loss = assess(changes, decide_by="loss")
    assert by_loss.outcome == "better" and by_loss.severity == "warning"


@pytest.mark.parametrize(("loss", "outcome"), [((-0.01, 0.01), "no difference"), ((-0.4, 0.4), "inconclusive")])
def test_a_score_that_tells_is_named_beside_a_loss_that_does_not(loss: tuple[float, float], outcome: str) -> None:
    verdict = assess({"loss": (3.0, 3.0, loss), "exact_match": (0.5, 0.3, (-0.3, -0.1))})
    assert verdict.outcome == outcome and verdict.severity == "warning"
    assert any("By exact match it is worse" in line for line in verdict.text_lines())


def test_answers_that_are_further_from_the_right_ones_are_in_the_headline() -> None:
    verdict = assess({**BETTER_LOSS, "token_f1": (0.52, 0.31, (-0.24, -0.18)), "chrf": (25.0, 18.0, (-9.0, -5.0))})
    assert verdict.outcome == "better" and "but its answers are worse by token f1" in verdict.sentence
    assert verdict.severity == "warning" and "report" in verdict.next_command


def test_a_metric_of_the_users_decides_by_its_own_direction() -> None:
    distance = AnswerMetric("distance", lambda prediction, reference: 0.0, lower_is_better=True)
    changes: Changes = {**BETTER_LOSS, "distance": (4.0, 2.0, (-3.0, -1.0))}
    assert assess(changes, own=[distance], decide_by="distance").outcome == "better"
    with pytest.raises(ConfigurationError, match=r"'distanc' is not measured .* Did you mean 'distance'\?"):
        assess(changes, own=[distance], decide_by="distanc")


def test_adapters_that_move_no_row_make_no_difference() -> None:
    verdict = assess({"loss": (3.0, 3.0, (0.0, 0.0))}, moved=False)
    assert verdict.outcome == "no difference" and "the same probability" in verdict.sentence


def test_two_runs_are_called_by_their_names_and_measured_in_bytes_across_tokenizers() -> None:
    labels = {"base": "run-1", "adapter": "run-2"}
    verdict = assess({"bits_per_byte": (1.0, 0.5, (-0.6, -0.4))}, labels=labels)
    assert verdict.sentence.startswith("run-2 is better than run-1 by bits per byte")


@pytest.mark.parametrize(
    ("delta", "interval", "code", "severity"),
    [
        (0.7, (0.6, 0.8), "prompt_used", "fine"),
        (0.08, (0.06, 0.1), "prompt_hardly_used", "warning"),
        (0.01, (-0.05, 0.06), "prompt_ignored", "problem"),
        (-0.2, (-0.3, -0.1), "prompt_ignored", "problem"),
        (0.3, (-0.2, 0.8), "prompt_unknown", "note"),
        (0.3, None, "prompt_unknown", "note"),
    ],
)
def test_whether_the_prompt_is_used_is_told_by_the_shuffled_control(
    delta: float, interval: tuple[float, float] | None, code: str, severity: str
) -> None:
    intervals = {"loss": interval} if interval else {}
    remark = prompt_remark(ControlResult(100, 900, {"loss": 3.0 + delta}, {"loss": 3.0}, {"loss": delta}, intervals))
    assert (remark.code, remark.severity) == (code, severity)


def test_an_adapter_that_is_better_but_never_ends_or_reads_no_prompt_is_not_fine() -> None:
    endings = {"base": Endings(50, 1, 0, 0, 40, 24), "adapter": Endings(50, 44, 0, 13, 40, 24)}
    control = ControlResult(200, 900, {"loss": 2.0}, {"loss": 2.0}, {"loss": 0.0}, {"loss": (0.0, 0.0)})
    verdict = assess(BETTER_LOSS, endings=endings, controls={"shuffled_prompts": control})
    assert verdict.outcome == "better" and verdict.severity == "problem"
    assert "44 of 50 answers of the adapter do not end" in verdict.sentence
    assert "ignores its prompt" in verdict.sentence and "report" in verdict.next_command


def test_of_two_runs_the_answers_of_both_are_counted() -> None:
    endings = {"base": Endings(50, 30, 0, 0, 40, 24), "adapter": Endings(50, 0, 5, 0, 40, 24)}
    found = assess(BETTER_LOSS, endings=endings, labels={"base": "run-1", "adapter": "run-2"}).remarks
    assert {(remark.code, remark.sentence.split(" do ")[0]) for remark in found if remark.code == "never_ends"} == {
        ("never_ends", "30 of 50 answers of run-1")
    }
    assert "cut_short" in {remark.code for remark in found}


def test_a_few_rows_that_come_twice_are_no_matter() -> None:
    assert not assess(BETTER_LOSS, distinct_rows=190).remarks
    assert [remark.code for remark in assess(BETTER_LOSS, distinct_rows=100).remarks] == ["repeated_rows"]


def test_domains_that_part_are_named() -> None:
    domains = {"hill": (BETTER_LOSS, 80), "lake": ({"loss": (2.0, 2.6, (0.3, 0.9))}, 80)}
    verdict = assess(BETTER_LOSS, domains=domains)
    (remark,) = [remark for remark in verdict.remarks if remark.code == "domains_part"]
    assert remark == Remark("domains_part", "warning", "By domain: better on hill; worse on lake.")
    alike = assess(BETTER_LOSS, domains={"hill": (BETTER_LOSS, 80), "lake": (BETTER_LOSS, 80)})
    assert not alike.remarks


def test_a_verdict_is_the_same_after_it_was_written_and_read() -> None:
    verdict = assess({**BETTER_LOSS, "exact_match": (0.1, 0.5, (0.3, 0.5))}, rows=12)
    assert Verdict.from_json(json.loads(json.dumps(verdict.as_json()))) == verdict
    assert verdict.as_json()["severity"] == verdict.severity == "warning"


@pytest.mark.parametrize(
    ("base", "validated", "outcome", "words"),
    [
        (3.0, [(10, 2.0)], "better", "one mean over 24 rows without an interval"),
        (3.0, [(10, 3.4), (20, 3.2)], "worse", "the best of 2 validations"),
        (3.0, [(10, 2.99)], "no difference", "2.9900"),
        (3.0, [], "inconclusive", "nothing was validated"),
        (None, [(10, 2.0)], "inconclusive", "base was not measured"),
    ],
)
def test_the_end_of_training_says_how_far_its_validation_goes(
    base: float | None, validated: list[tuple[int, float]], outcome: str, words: str
) -> None:
    verdict = assess_training(build_training_record([10, 20], [2.5, 1.5], base, validated, 24), "runs/x")
    assert verdict.outcome == outcome and words in verdict.sentence and verdict.basis == "training"
    assert verdict.next_command.startswith("training-lens compare --run runs/x")
    assert assess_training(TrainingRecord(0)).next_command == ""


def test_what_happened_after_the_best_validation_is_said() -> None:
    record = build_training_record(range(1, 41), [3.0 - 0.07 * i for i in range(40)], 3.0, [(10, 2.0), (40, 2.9)])
    (remark,) = assess_training(record).remarks
    assert remark.code == "validation_rises" and "memorized" in remark.sentence
    assert assess_training(build_training_record([1, 2], [3.0], 3.0, [(2, 2.0)])).severity == "problem"


@pytest.mark.parametrize(("late", "codes"), [(0.1, ["train_gap"]), (1.5, [])])
def test_a_training_loss_far_below_is_said_while_other_rows_gain_too(late: float, codes: list[str]) -> None:
    record = build_training_record(range(1, 41), [3.0] * 20 + [late] * 20, 3.0, [(10, 2.5), (40, 2.0)])
    assert [remark.code for remark in assess_training(record).remarks] == codes


def test_the_verdict_in_the_readme_is_that_of_the_committed_results() -> None:
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks/results/real_files.json").read_text(encoding="utf-8"))
    found = results["embedded"]["compare"]
    base, adapter, ends = found["base"], found["adapter"], found["intervals"]
    changes = {name: (base[name], adapter[name], (ends[name][0], ends[name][1])) for name in found["delta"]}
    control = ControlResult(**found["controls"]["shuffled_prompts"])
    lines = assess(changes, found["rows"], controls={"shuffled_prompts": control}, run="").text_lines()
    assert "\n".join(lines) in (root / "README.md").read_text(encoding="utf-8")
