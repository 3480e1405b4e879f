"""A run is judged on rows that it did not train on, as it trained; what is measured is what the loop measured."""

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
from training_lens.config.judging_sections import EvaluationSection
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.evaluation.judging import Judge, Judgement
from training_lens.inference.rows import configured_examples, validation_examples
from training_lens.inference.session import Session, open_run, open_session
from training_lens.utils.runs import RunFolder

ROWS = [{"question": f"What is {i} plus 1?", "answer": f"{i} plus 1 is {i + 1}."} for i in range(30)]
LOSSES = EvaluationSection(generate=False, resamples=50, length_buckets=2)


def trained(small_config: Callable[..., Any], write_rows: Callable[..., Path], **data: Any) -> tuple[RunFolder, Any]:
    config = small_config(data={"train": str(write_rows(ROWS)), **data}, training={"max_steps": 2})
    summary = TrainingWrapper(config).train()
    return RunFolder(Path(summary.run_dir)), summary


@pytest.fixture(scope="module")
def session(finished_run: RunFolder) -> Session:
    return open_run(finished_run)


@pytest.fixture(scope="module")
def judged(finished_run: RunFolder, session: Session) -> Judgement:
    settings = EvaluationSection(max_new_tokens=24, resamples=50)
    return Judge(session, settings).compare(validation_examples(finished_run, session, 12))


def test_held_out_rows_are_those_that_training_left_out(
    small_config: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    run, summary = trained(small_config, write_rows, val_ratio=0.3, max_examples=None)
    session = open_run(run)
    judgement = Judge(session, EvaluationSection(max_new_tokens=8)).compare(validation_examples(run, session))
    assert [e.id for e in judgement.rows.examples] == run.read_metadata("held_out.json")
    assert len(judgement.rows.examples) == 9
    models = judgement.comparison.whole.models
    assert models["adapter"]["loss"] == pytest.approx(summary.validation_loss, rel=1e-5)
    assert models["base"]["loss"] == pytest.approx(summary.base_validation_loss, rel=1e-5)
    assert list(judgement.comparison.controls) == ["shuffled_prompts"]


def test_a_baseline_is_the_base_loss_of_the_run_on_the_same_rows(
    small_config: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    run, summary = trained(small_config, write_rows, val_ratio=0.3, max_examples=None)
    config = TrainingConfig.model_validate(run.read_metadata("config.json")).resolved(inference={"adapter": "none"})
    session = open_session(config)
    examples = configured_examples(session)
    assert [e.id for e in examples] == run.read_metadata("held_out.json")
    found = Judge(session, LOSSES).alone(examples).comparison.whole.models
    assert found["base"]["loss"] == pytest.approx(summary.base_validation_loss, rel=1e-5)


def test_a_run_without_validation_rows_can_be_judged_on_others(
    small_config: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    run, _ = trained(small_config, write_rows)
    session = open_run(run)
    with pytest.raises(ConfigurationError, match="had no validation rows"):
        validation_examples(run, session)
    others = write_rows([{"question": "Who?", "answer": "Mia."}], "others.jsonl")
    found = Judge(session, LOSSES).alone(validation_examples(run, session, others=[str(others)]))
    assert found.comparison.whole.rows == 1 and found.comparison.whole.intervals == {}


def test_every_measure_equals_a_naive_computation_in_float64(session: Session, judged: Judgement) -> None:
    model, rows = session.model, judged.rows
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
    found = judged.comparison.whole.models["adapter"]
    assert found["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert found["bits_per_token"] == pytest.approx(nll / tokens / math.log(2), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / text_bytes, rel=1e-5)
    assert found["token_accuracy"] == correct / tokens
    assert found["forward_kl"] == pytest.approx(divergence / tokens, rel=1e-4)


def test_base_and_adapter_answer_the_same_prompts_and_every_row_counts(judged: Judgement) -> None:
    outcomes = judged.outcomes
    assert len(outcomes["base"].answers) == len(outcomes["adapter"].answers) == 12
    assert outcomes["base"].answers != outcomes["adapter"].answers
    for name, outcome in outcomes.items():
        matches = [a.strip() == r.strip() for a, r in zip(outcome.answers, judged.rows.references, strict=True)]
        assert judged.comparison.whole.models[name]["exact_match"] == np.mean(matches)


def test_controls_keep_answers_and_rows(judged: Judgement) -> None:
    controls = judged.comparison.controls
    assert {c.rows for c in controls.values()} == {12}
    assert controls["shuffled_prompts"].scores["loss"] > judged.comparison.whole.models["adapter"]["loss"]


def test_a_run_against_itself_has_no_difference(session: Session, finished_run: RunFolder) -> None:
    judge = Judge(session, LOSSES)
    found = judge.against(judge, validation_examples(finished_run, session, 6)).comparison
    assert found.whole.delta["loss"] == 0.0 and found.whole.intervals["loss"] == (0.0, 0.0)
    assert found.improved == found.worsened == []


def test_the_base_alone_is_the_base_of_the_comparison(
    session: Session, finished_run: RunFolder, judged: Judgement
) -> None:
    alone = Judge(session, LOSSES).alone(validation_examples(finished_run, session, 12), base=True)
    assert alone.comparison.whole.models["base"]["loss"] == pytest.approx(
        judged.comparison.whole.models["base"]["loss"], rel=1e-6
    )


def test_forgetting_is_measured_on_text_of_the_users_choice(
    session: Session, finished_run: RunFolder, write_rows: Callable[..., Path]
) -> None:
    text = write_rows([{"text": f"The cat {i} sat on the mat."} for i in range(5)], "stories.jsonl")
    settings = LOSSES.model_copy(update={"forgetting": [str(text)], "controls": False})
    forgot = Judge(session, settings).compare(validation_examples(finished_run, session, 4)).comparison.forgetting
    assert forgot is not None and forgot.rows == 5 and forgot.interval is not None
    assert forgot.delta == pytest.approx(forgot.adapter_loss - forgot.base_loss)


def test_plain_texts_have_losses_and_no_answers(text_run: RunFolder, write_rows: Callable[..., Path]) -> None:
    session = open_run(text_run)
    others = write_rows([{"text": f"The cat {i} sat.", "domain": "ab"[i % 2]} for i in range(4)], "texts.jsonl")
    found = Judge(session, EvaluationSection()).compare(validation_examples(text_run, session, others=[str(others)]))
    assert found.comparison.whole.models["adapter"]["loss"] > 0
    assert not any(o.answers[0] for o in found.outcomes.values())
    assert "exact_match" not in found.comparison.whole.models["adapter"]
    assert list(found.comparison.controls) == ["wrong_domain", "no_domain"]


def test_rows_that_do_not_fit_are_an_error_and_wrong_buckets_are_told_first(session: Session) -> None:
    with pytest.raises(DatasetError, match="none of the 0 rows"):
        Judge(session, LOSSES).alone([])
    with pytest.raises(ConfigurationError, match=r"length_buckets: \[5, 5\]"):
        Judge(session, EvaluationSection(length_buckets=[5, 5]))


def test_calls_of_tools_are_expected_as_the_template_writes_them(
    session: Session, finished_run: RunFolder, write_rows: Callable[..., Path]
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    others = write_rows([{"messages": chat}], "calls.jsonl")
    found = Judge(session, LOSSES).alone(validation_examples(finished_run, session, others=[str(others)]))
    assert json.loads(found.rows.references[0])["name"] == "add"
