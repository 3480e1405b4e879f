"""lm-eval's scores on local tasks are those of our own forward; the network is not asked, nothing stays changed."""

from __future__ import annotations

import logging
import random
import shutil
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from training_lens import TrainingWrapper
from training_lens.errors import ConfigurationError
from training_lens.evaluation.harness import TaskOptions, run_tasks
from training_lens.inference.session import Session, open_run
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder

pytest.importorskip("lm_eval")

COLOURS = ("red", "blue", "green", "yellow")
QUESTIONS = [
    {
        "text": f"Zoe had {i} {colour} plates. Zoe gave Max",
        "choices": ["2 of them.", "3 of them.", "4 of them."],
        "gold": i % 3,
    }
    for i, colour in zip(range(12), COLOURS * 3, strict=True)
]
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""
ANSWER = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
TEXT = """
output_type: loglikelihood_rolling
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def session(finished_run: RunFolder) -> Session:
    return open_run(finished_run)


@pytest.fixture
def write_task(
    tmp_path: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, list[Any]], str]:
    """Writes a task and its rows, and gives the folder; whoever asks the network fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    def write(name: str, body: str, rows: list[Any]) -> str:
        data = write_rows(rows, f"{name}.jsonl")
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(f'{head}doc_to_text: "{{{{text}}}}"\n{body}')
        return str(tmp_path)

    return write


def likelihood(session: Session, text: str, continuation: str) -> float:
    """The log probability of a continuation, by one plain forward pass."""
    asked, whole = session.tokenizer.encode(text), session.tokenizer.encode(text + continuation)
    assert whole[: len(asked)] == asked
    with torch.inference_mode():
        log_p = session.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(log_p[i - 1, whole[i]]) for i in range(len(asked), len(whole)))


@pytest.mark.parametrize("base", [False, True])
def test_multiple_choice_is_the_ranking_of_our_own_forward(
    session: Session, write_task: Callable[..., str], base: bool
) -> None:
    folder = write_task("choose", CHOICE, QUESTIONS)
    found = run_tasks(session, ["choose"], TaskOptions(include_path=folder, base=base, batch_tokens=64))
    with base_only(session.model, base):
        scores = [[likelihood(session, row["text"], f" {c}") for c in row["choices"]] for row in QUESTIONS]
    right = [s.index(max(s)) == row["gold"] for s, row in zip(scores, QUESTIONS, strict=True)]
    share = sum(right) / len(right)
    assert 0 < share < 1
    assert found["choose"]["acc"] == pytest.approx(share)
    assert found["choose"]["acc_stderr"] == pytest.approx((share * (1 - share) / (len(right) - 1)) ** 0.5)


@pytest.mark.slow
def test_a_model_with_modules_trained_whole_is_scored(
    small_config: Callable[..., Any], write_task: Callable[..., str]
) -> None:
    """lm-eval ties weights anew, which such a model does not survive."""
    config = small_config(peft={"modules_to_save": ["lm_head"]}, training={"max_steps": 1}, data={"max_examples": 8})
    session = open_run(RunFolder(Path(TrainingWrapper(config).train().run_dir)))
    folder = write_task("choose", CHOICE, QUESTIONS)
    assert run_tasks(session, ["choose"], TaskOptions(include_path=folder, limit=2))["choose"]["acc"] in (0, 0.5, 1)
    assert "tie_weights" not in vars(session.model)


def greedy(session: Session, text: str, count: int) -> str:
    ids = session.tokenizer.encode(text)
    start = len(ids)
    with torch.inference_mode():
        while len(ids) < start + count and ids[-1] != session.tokenizer.eos_token_id:
            ids.append(int(session.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(session.tokenizer.decode(ids[start:], skip_special_tokens=True)).split("\n")[0]


def test_answers_are_those_of_greedy_decoding(session: Session, write_task: Callable[..., str]) -> None:
    answers = [greedy(session, row["text"], 6) for row in QUESTIONS]
    assert any(answers)
    rows = [
        {"text": row["text"], "answer": answer if i % 4 else f"not {answer}"}
        for i, (row, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    folder = write_task("answer", ANSWER, rows)
    assert run_tasks(session, ["answer"], TaskOptions(include_path=folder))["answer"]["exact_match"] == pytest.approx(
        0.75
    )
    first = run_tasks(session, ["answer"], TaskOptions(include_path=folder, limit=2, batch_tokens=1))
    assert first["answer"]["exact_match"] == pytest.approx(0.5)


def test_several_tasks_and_a_text(session: Session, write_task: Callable[..., str]) -> None:
    write_task("choose", CHOICE, QUESTIONS)
    folder = write_task("text", TEXT, [{"text": "Zoe had"}])
    found = run_tasks(session, ["choose", "text"], TaskOptions(include_path=folder))
    assert set(found) == {"choose", "text"} and found["text"]["word_perplexity"] > 1


def test_session_and_process_are_left_as_they_were(
    session: Session, write_task: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> list[Any]:
        ids = torch.tensor([session.tokenizer.encode("Zoe had")])
        with torch.inference_mode():
            logits = session.model(ids).logits
        generators = (torch.get_rng_state().tolist(), random.getstate())
        levels = [logging.getLogger(name).level for name in ("lm_eval", "datasets")]
        return [logits.tolist(), session.tokenizer.pad_token, generators, levels, constants.HF_HUB_OFFLINE]

    before = state()
    run_tasks(
        session, ["choose"], TaskOptions(include_path=write_task("choose", CHOICE, QUESTIONS), limit=2, base=True)
    )
    assert state() == before
    assert capsys.readouterr() == ("", "")


def test_what_is_longer_than_the_model_is_said(
    session: Session, write_task: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    long = {**QUESTIONS[0], "text": "Zoe had plates. " * 300}
    logging.getLogger("training_lens").addHandler(caplog.handler)
    run_tasks(session, ["long"], TaskOptions(include_path=write_task("long", CHOICE, [long, QUESTIONS[1]])))
    logging.getLogger("training_lens").removeHandler(caplog.handler)
    assert "3 of 6 requests are longer than the model's 512 positions" in caplog.text


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("unsafe", CHOICE + "unsafe_code: true\n", "unsafe: lm-eval fails: .*marked as unsafe"),
        ("wrong", CHOICE.replace("multiple_choice", "no_such_type"), "wrong cannot be loaded: .*no_such_type"),
        ("field", CHOICE.replace("{{choices}}", "{{choice}}"), "field cannot be loaded|field: lm-eval fails"),
        ("room", ANSWER.replace("6", "600"), "room: lm-eval fails: .*600"),
    ],
)
def test_a_task_that_fails_says_why(
    session: Session, write_task: Callable[..., str], name: str, body: str, message: str
) -> None:
    rows = [{**row, "answer": "x"} for row in QUESTIONS]
    with pytest.raises(ConfigurationError, match=message):
        run_tasks(session, [name], TaskOptions(include_path=write_task(name, body, rows)))


def test_missing_data_files_and_folders_are_said(session: Session, write_task: Callable[..., str]) -> None:
    folder = write_task("gone", CHOICE, QUESTIONS)
    (Path(folder) / "gone.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"gone cannot be loaded: .*gone\.jsonl"):
        run_tasks(session, ["gone"], TaskOptions(include_path=folder))
    with pytest.raises(ConfigurationError, match=r"evaluation\.task_path: there is no folder 'nowhere'"):
        run_tasks(session, ["gone"], TaskOptions(include_path="nowhere"))


def test_unknown_tasks_are_said_with_the_nearest(
    session: Session,
    write_task: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of lm-eval's own tasks, one folder stands for all, which take seconds to read."""
    manager = import_module("lm_eval.tasks.manager")
    own = tmp_path_factory.mktemp("own")
    shutil.copytree(Path(manager.__file__ or "").parent / "hellaswag", own / "hellaswag")
    monkeypatch.setattr(manager, "__file__", str(own / "manager.py"))
    folder = write_task("choose", CHOICE, QUESTIONS)
    with pytest.raises(ConfigurationError) as caught:
        run_tasks(session, ["chose", "hellaswagg"], TaskOptions(include_path=folder))
    assert [problem.split(". ")[-1] for problem in caught.value.problems] == [
        "Did you mean 'choose'?",
        "Did you mean 'hellaswag'?",
    ]


def test_data_that_would_be_downloaded_fail_at_once(
    session: Session, write_task: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_task("far", CHOICE, QUESTIONS)
    (Path(folder) / "far.yaml").write_text(f"task: far\ndataset_path: nobody/nothing\ntest_split: test\n{CHOICE}")
    monkeypatch.undo()  # the network may be asked, and is not there
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match=r"data of far is no local path, and the hub .* cannot be reached"):
        run_tasks(session, ["far"], TaskOptions(include_path=folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=r"far cannot be loaded offline: .*Give tasks with local data files"):
        run_tasks(session, ["far"], TaskOptions(include_path=folder))


def test_without_lm_eval_the_install_command_is_said(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    with pytest.raises(ConfigurationError, match=r"pip install 'training-lens\[eval\]'"):
        run_tasks(session, ["any"])
