"""A user's metric is one decorated function; what it cannot score is an error that names the answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.errors import ConfigurationError, EvaluationError
from training_lens.evaluation import own_metrics
from training_lens.evaluation.metrics import AnswerScoring, row_scores
from training_lens.evaluation.own_metrics import find_metrics, metric

MODULE = """
from training_lens.evaluation import metric

@metric("polite")
def says_please(prediction, reference):
    return "please" in prediction

@metric("extra_words", lower_is_better=True)
def extra_words(prediction, reference):
    return None if not reference else len(prediction.split()) - len(reference.split())

def plain(prediction, reference):
    return 1
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_metrics.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "nothing.py").write_text("x = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_metrics, "_METRICS", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("my_metrics", "broken", "nothing"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("my_metrics.says_please", ["polite"]),
        ("my_metrics", ["polite", "extra_words"]),
        ("my_metrics.py", ["polite", "extra_words"]),
    ],
)
def test_metrics_are_found_as_functions_modules_and_files(place: str, names: list[str]) -> None:
    assert list(find_metrics([place])) == names


def test_a_metric_without_a_name_is_called_as_its_function(tmp_path: Path) -> None:
    for number, decorator in enumerate(("@metric", "@metric()", "@metric(lower_is_better=True)")):
        function = f"def own{number}(prediction, reference): return 1"
        code = f"from training_lens.evaluation import metric\n{decorator}\n{function}"
        (tmp_path / f"own{number}.py").write_text(code)
        (found,) = find_metrics([f"own{number}.py"]).values()
        assert (found.name, found.lower_is_better, found("a", "b")) == (f"own{number}", number == 2, 1.0)


@pytest.mark.parametrize("arguments", ["prediction", "prediction, reference, row", "*, prediction, reference"])
def test_a_function_of_other_arguments_is_refused_before_anything_is_generated(arguments: str, tmp_path: Path) -> None:
    code = f"from training_lens.evaluation import metric\n@metric\ndef odd({arguments}): return 1"
    (tmp_path / "odd.py").write_text(code)
    with pytest.raises(ConfigurationError, match=r"odd does not take \(prediction, reference\)"):
        find_metrics(["odd.py"])


def test_rows_that_a_metric_leaves_out_are_counted() -> None:
    scoring = AnswerScoring.from_settings(EvaluationSection(metrics=["my_metrics"]))
    references = ["#### 12 apples", "", "#### 3", "## 2. Steps"]
    scores = [row_scores(answers, references, scoring) for answers in (["a"] * 4, ["b"] * 4)]
    found = scoring.count_unscored(references, scores)
    assert found["extra_words"] == {"the metric gives None": 1} and "polite" not in found
    assert found["numeric"] == {"a marked answer that is more than a number": 1}
    assert "extra_words" in scoring.count_unscored([""], [row_scores(["a"], [""], scoring)])


def test_the_scores_of_an_own_metric_stand_beside_the_others() -> None:
    scoring = AnswerScoring.from_settings(EvaluationSection(metrics=["my_metrics"]))
    scores = row_scores(["please sit", "sit"], ["sit", ""], scoring)
    assert scores["polite"].tolist() == [1.0, 0.0]
    assert scores["extra_words"][0] == 1.0 and scores["extra_words"][1] != scores["extra_words"][1]
    assert scoring.own["extra_words"].lower_is_better


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decide_by": "exact_mach"}, r"'exact_mach' is no measure; .*Did you mean 'exact_match'\?"),
        ({"decide_by": "exact_match", "generate": False}, "no measure without answers"),
    ],
)
def test_what_cannot_decide_is_told_before_the_work(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AnswerScoring.from_settings(EvaluationSection.model_validate(settings))
    own = EvaluationSection(decide_by="polite", metrics=["my_metrics"])
    assert list(AnswerScoring.from_settings(own).own) == ["polite", "extra_words"]


def test_a_metric_registered_in_python_is_found_by_its_name() -> None:
    @metric("length")
    def length(prediction: str, reference: str) -> float:
        return len(prediction)

    assert find_metrics(["length"]) == {"length": length} and length("four", "") == 4.0


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("my_metrics.says_pleas", "Did you mean my_metrics.says_please"),
        ("my_metrics.plain", "'my_metrics.plain' is no metric"),
        ("nothing", "'nothing' has no metric"),
        ("missing_module.polite", "'missing_module.polite' cannot be imported"),
        ("missing.py", "there is no file 'missing.py'"),
        ("broken", "cannot be imported"),
        ("broken.py", "cannot be imported"),
    ],
)
def test_what_is_no_metric_is_refused(place: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=r"evaluation\.metrics") as found:
        find_metrics([place])
    assert message in str(found.value)


def test_a_built_in_name_a_second_function_and_a_name_with_spaces_are_refused() -> None:
    @metric("exact_match")
    def exact_match(prediction: str, reference: str) -> float:
        return 1.0

    with pytest.raises(ConfigurationError, match="exact_match is a built-in measure's"):
        AnswerScoring.from_settings(EvaluationSection(metrics=["exact_match"]))
    with pytest.raises(ConfigurationError, match=r"is .*exact_match already"):
        metric("exact_match")(lambda prediction, reference: 0.0)
    with pytest.raises(ConfigurationError, match="no name of a metric"):
        metric("my metric")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high", [1]])
def test_a_score_that_is_no_number_names_metric_and_answer(value: object) -> None:
    @metric("wrong")
    def wrong(prediction: str, reference: str) -> float:
        return value  # type: ignore[return-value]

    with pytest.raises(EvaluationError, match=r"wrong .*'said'"):
        row_scores(["said"], ["expected"], AnswerScoring(own={"wrong": wrong}))
