"""A run is evaluated on rows that it did not train on, as it trained; what is measured is what the loop measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training_lens import TrainingWrapper
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError, DatasetError, EvaluationError
from training_lens.evaluation.run_evaluation import EvaluationResult, ModelEvaluator
from training_lens.inference.heldout_examples import configured_examples, validation_examples
from training_lens.inference.session import Session, open_run, open_session
from training_lens.runs.run_folder import RunFolder

ROWS = [{"question": f"What is {i} plus 1?", "answer": f"{i} plus 1 is {i + 1}."} for i in range(30)]
LOSSES = EvaluationSection(generate=False, resamples=50, length_buckets=2)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def split_run(
    small_config_in: Callable[..., Any], rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, Any]:
    """A run that held rows of its file out, and its summary. For reading alone."""
    data = {"train": str(rows_file), "val_ratio": 0.3, "max_examples": None}
    config = small_config_in(tmp_path_factory.mktemp("outputs"), data=data, training={"max_steps": 2})
    summary = TrainingWrapper(config).train()
    return RunFolder(Path(summary.run_dir)), summary


def open_on(run: RunFolder, path: Path, *, model: dict[str, Any] | None = None, **data: Any) -> Session:
    """The adapter of a run with other data."""
    sections = {"data": {"train": str(path), **data}, "model": model or {}, "inference": {"adapter": str(run.adapter)}}
    return open_session(TrainingConfig.model_validate(sections))


@pytest.fixture(scope="module")
def session(finished_run: RunFolder) -> Session:
    return open_run(finished_run)


@pytest.fixture(scope="module")
def result(finished_run: RunFolder, session: Session) -> EvaluationResult:
    settings = EvaluationSection(max_new_tokens=24, resamples=50)
    return ModelEvaluator(session, settings).compare(validation_examples(finished_run, session, 12))


@pytest.mark.slow
def test_held_out_rows_are_those_that_training_left_out(split_run: tuple[RunFolder, Any]) -> None:
    run, summary = split_run
    session = open_run(run)
    result = ModelEvaluator(session, EvaluationSection(max_new_tokens=8)).compare(validation_examples(run, session))
    assert [e.id for e in result.rows.examples] == run.read_metadata("held_out.json")
    assert len(result.rows.examples) == 9
    models = result.comparison.whole.models
    assert models["adapter"]["loss"] == pytest.approx(summary.validation_loss, rel=1e-5)
    assert models["base"]["loss"] == pytest.approx(summary.base_validation_loss, rel=1e-5)
    assert list(result.comparison.controls) == ["shuffled_prompts"]


@pytest.mark.slow
def test_a_baseline_is_the_base_loss_of_the_run_on_the_same_rows(split_run: tuple[RunFolder, Any]) -> None:
    run, summary = split_run
    config = TrainingConfig.model_validate(run.read_metadata("config.json")).replace_keys(inference={"adapter": "none"})
    session = open_session(config)
    examples = configured_examples(session)
    assert [e.id for e in examples] == run.read_metadata("held_out.json")
    found = ModelEvaluator(session, LOSSES).evaluate(examples).comparison.whole.models
    assert found["base"]["loss"] == pytest.approx(summary.base_validation_loss, rel=1e-5)


@pytest.mark.slow
def test_a_run_without_validation_rows_can_be_evaluated_on_others(
    small_config: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    config = small_config(data={"train": str(write_rows(ROWS))}, training={"max_steps": 1})
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    session = open_run(run)
    with pytest.raises(ConfigurationError, match="had no validation rows"):
        validation_examples(run, session)
    others = write_rows([{"question": "Who?", "answer": "Mia."}], "others.jsonl")
    found = ModelEvaluator(session, LOSSES).evaluate(validation_examples(run, session, others=[str(others)]))
    assert found.comparison.whole.rows == 1 and found.comparison.whole.intervals == {}


def test_every_measure_equals_a_naive_computation_in_float64(session: Session, result: EvaluationResult) -> None:
    model, rows = session.model, result.rows
    nll, tokens, correct, divergence = 0.0, 0, 0, 0.0
    for e in rows.dataset:
        ids = torch.from_numpy(e.input_ids.astype("int64"))[None]
        with torch.inference_mode():
            q = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with model.disable_adapter():
                p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        mask = torch.from_numpy(e.loss_mask[1:])
        targets = ids[0, 1:][mask]
        nll -= q[mask].gather(-1, targets[:, None]).sum().item()
        divergence += (p[mask].exp() * (p[mask] - q[mask])).sum().item()
        correct += int((q[mask].argmax(-1) == targets).sum())
        tokens += len(targets)
    text_bytes = sum(len(example.messages[-1].text.encode()) for example in rows.examples)
    found = result.comparison.whole.models["adapter"]
    assert found["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert found["bits_per_token"] == pytest.approx(nll / tokens / math.log(2), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / text_bytes, rel=1e-5)
    assert found["token_accuracy"] == correct / tokens
    assert found["forward_kl"] == pytest.approx(divergence / tokens, rel=1e-4)


def test_base_and_adapter_answer_the_same_prompts_and_every_row_counts(result: EvaluationResult) -> None:
    outcomes = result.outcomes
    assert len(outcomes["base"].answers) == len(outcomes["adapter"].answers) == 12
    assert outcomes["base"].answers != outcomes["adapter"].answers
    for name, outcome in outcomes.items():
        matches = [a.strip() == r.strip() for a, r in zip(outcome.answers, result.rows.references, strict=True)]
        assert result.comparison.whole.models[name]["exact_match"] == np.mean(matches)


def test_controls_keep_answers_and_rows(embedded_run: RunFolder) -> None:
    session, settings = open_run(embedded_run), EvaluationSection(generate=False, resamples=50)
    found = ModelEvaluator(session, settings).compare(validation_examples(embedded_run, session, 12)).comparison
    controls = found.controls
    assert {c.rows for c in controls.values()} == {12}
    assert all(c.adapter == found.whole.models["adapter"] for c in controls.values())
    assert controls["shuffled_prompts"].delta["loss"] > 0


def test_a_run_against_itself_has_no_difference(session: Session, finished_run: RunFolder) -> None:
    evaluator = ModelEvaluator(session, LOSSES)
    found = evaluator.compare_with(evaluator, validation_examples(finished_run, session, 6)).comparison
    assert found.whole.delta["loss"] == 0.0 and found.whole.intervals["loss"] == (0.0, 0.0)
    assert found.improved == found.worsened == []


def test_the_base_alone_is_the_base_of_the_comparison(
    session: Session, finished_run: RunFolder, result: EvaluationResult
) -> None:
    alone = ModelEvaluator(session, LOSSES).evaluate(validation_examples(finished_run, session, 12), base=True)
    assert alone.comparison.whole.models["base"]["loss"] == pytest.approx(
        result.comparison.whole.models["base"]["loss"], rel=1e-6
    )


def test_forgetting_is_measured_on_text_of_the_users_choice(
    session: Session, finished_run: RunFolder, write_rows: Callable[..., Path]
) -> None:
    text = write_rows([{"text": f"The cat {i} sat on the mat."} for i in range(5)], "stories.jsonl")
    settings = LOSSES.model_copy(update={"forgetting": [str(text)], "controls": False})
    forgot = (
        ModelEvaluator(session, settings).compare(validation_examples(finished_run, session, 4)).comparison.forgetting
    )
    assert forgot is not None and forgot.rows == 5 and forgot.interval is not None
    assert forgot.delta == pytest.approx(forgot.adapter_loss - forgot.base_loss)


def test_plain_texts_have_losses_and_no_answers(text_run: RunFolder, write_rows: Callable[..., Path]) -> None:
    session = open_run(text_run)
    others = write_rows([{"text": f"The cat {i} sat.", "domain": "ab"[i % 2]} for i in range(4)], "texts.jsonl")
    found = ModelEvaluator(session, EvaluationSection()).compare(
        validation_examples(text_run, session, others=[str(others)])
    )
    assert found.comparison.whole.models["adapter"]["loss"] > 0
    assert not any(o.answers[0] for o in found.outcomes.values())
    assert "exact_match" not in found.comparison.whole.models["adapter"]
    assert list(found.comparison.controls) == ["wrong_domain", "no_domain"]


def test_rows_that_do_not_fit_are_an_error_and_wrong_buckets_are_told_first(session: Session) -> None:
    with pytest.raises(DatasetError, match="none of the 0 rows"):
        ModelEvaluator(session, LOSSES).evaluate([])
    with pytest.raises(ConfigurationError, match=r"length_buckets: \[5, 5\]"):
        ModelEvaluator(session, EvaluationSection(length_buckets=[5, 5]))


def test_calls_of_tools_are_expected_as_the_template_writes_them(
    session: Session, finished_run: RunFolder, write_rows: Callable[..., Path]
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    others = write_rows([{"messages": chat}], "calls.jsonl")
    found = ModelEvaluator(session, LOSSES).evaluate(validation_examples(finished_run, session, others=[str(others)]))
    assert json.loads(found.rows.references[0])["name"] == "add"


def test_held_out_rows_of_a_file_that_has_changed_cannot_be_told(
    split_run: tuple[RunFolder, Any], rows_file: Path
) -> None:
    content = rows_file.read_text()
    rows_file.write_text(content + content.splitlines()[0])
    try:
        with pytest.raises(DatasetError, match=r"has changed since the run .* held rows of it out"):
            validation_examples(split_run[0], open_run(split_run[0]))
    finally:
        rows_file.write_text(content)


def long_and_short(count: int) -> list[dict[str, str]]:
    """Long prompts with short answers and the reverse, in turn."""
    long = "one two three four five six seven eight nine ten " * 2
    return [{"question": [long, "Who?"][i % 2] + str(i), "answer": ["Mia.", long][i % 2]} for i in range(count)]


@pytest.mark.parametrize("truncation", ["drop", "keep_start", "keep_end"])
def test_a_control_is_measured_on_the_same_tokens_as_the_adapter(
    truncation: str, embedded_run: RunFolder, write_rows: Callable[..., Path]
) -> None:
    rows, model = write_rows(long_and_short(12)), {"seq_len": 120}
    session = open_on(embedded_run, rows, truncation=truncation, val_ratio=0.5, model=model)
    found = ModelEvaluator(session, LOSSES).compare(configured_examples(session))
    shuffled = found.comparison.controls["shuffled_prompts"]
    lengths = {e.id: e for e in found.rows.examples}
    assert 0 < shuffled.rows <= len(lengths)
    assert shuffled.delta["loss"] == pytest.approx(shuffled.scores["loss"] - shuffled.adapter["loss"])
    if shuffled.rows == len(lengths):
        assert shuffled.adapter["loss"] == pytest.approx(found.comparison.whole.models["adapter"]["loss"], rel=1e-6)


def test_where_prompts_are_learned_too_no_control_is_the_same(embedded_run: RunFolder, rows_file: Path) -> None:
    session = open_on(embedded_run, rows_file, val_ratio=0.3, mask_prompt=False)
    assert ModelEvaluator(session, LOSSES).compare(configured_examples(session)).comparison.controls == {}


def test_a_row_whose_answer_leaves_no_prompt_is_evaluated_by_its_loss_alone(
    session: Session, finished_run: RunFolder, write_rows: Callable[..., Path]
) -> None:
    full = {"question": "Why?", "answer": "The owl lives in the forest. " * 200}
    others = write_rows([full, {"question": "Where does the owl live?", "answer": "In the forest."}], "long.jsonl")
    settings = EvaluationSection(max_new_tokens=4, resamples=0)
    found = ModelEvaluator(session, settings).evaluate(validation_examples(finished_run, session, others=[str(others)]))
    assert found.rows.has_prompt.tolist() == [False, True]
    assert found.comparison.whole.rows == 2 and "exact_match" in found.comparison.whole.models["adapter"]


def test_bytes_are_those_of_the_text_also_where_the_tokenizer_has_no_token(
    session: Session, finished_run: RunFolder, write_rows: Callable[..., Path]
) -> None:
    answers = ["Żółw — 🐢 lives here.", "plain", "<|endoftext|> as text", "two\nlines"]
    others = write_rows([{"question": f"Q{i}?", "answer": a} for i, a in enumerate(answers)], "unicode.jsonl")
    found = ModelEvaluator(session, LOSSES).evaluate(validation_examples(finished_run, session, others=[str(others)]))
    assert found.rows.text_bytes.tolist() == [len(a.encode()) for a in answers]


def test_losses_that_are_no_numbers_are_refused_by_row(finished_run: RunFolder) -> None:
    session = open_run(finished_run)
    with torch.no_grad():
        next(p for n, p in session.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(EvaluationError, match="the loss of the adapter is not finite on 3 of 3 rows, the first is"):
        ModelEvaluator(session, LOSSES).compare(validation_examples(finished_run, session, 3))
