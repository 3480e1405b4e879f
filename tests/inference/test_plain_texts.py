"""A run on plain texts alone continues a prompt as it learned to: the domain's prefix and the text, no template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens.config.data_sections import FieldsSection
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Example, Message
from training_lens.data.fields import are_plain_texts
from training_lens.inference.batch import answer_file, input_file
from training_lens.inference.chat import Conversation
from training_lens.inference.generator import answer
from training_lens.inference.session import Session, open_run
from training_lens.runs.run_folder import RunFolder

SETTINGS = InferenceSection(max_new_tokens=6)


@pytest.fixture(scope="module")
def session(text_run: RunFolder) -> Session:
    return open_run(text_run)


def ids(session: Session, text: str, domain: str | None = None) -> list[int]:
    return session.prompt_ids([Message("user", text)], domain)


@pytest.mark.parametrize("domain", [None, "a"])
@pytest.mark.parametrize("start", ["The cat", "Names like <|end|> stay text", "It ends in <|end|>", "<|user|>"])
def test_a_prompt_is_how_training_began_such_a_text(session: Session, start: str, domain: str | None) -> None:
    whole = Example((Message("assistant", f"{start} sat."),), domain, "", 0, is_text=True)
    trained = session.encoder.encode_prompt(session.renderer.render_example(whole))
    prompt = ids(session, start, domain)
    assert trained[: len(prompt)] == prompt and session.stop_ids == {trained[-1]}
    prefix = "[domain: a] " if domain else ""
    assert session.tokenizer.decode(prompt) == f"<|bos|>{prefix}{start}"


def test_other_runs_keep_their_template(finished_run: RunFolder, text_run: RunFolder) -> None:
    assert (open_run(finished_run).continues_text, open_run(text_run).continues_text) == (False, True)


@pytest.mark.parametrize(
    ("mappings", "fields", "texts"),
    [
        (["text"], {}, True),
        (["text", "text, domain from topic"], {}, True),
        (["text", "question -> answer"], {}, False),
        (["messages"], {}, False),
        (["body"], {"text": "body"}, True),
        (["text"], {"messages": "text"}, False),
    ],
)
def test_only_texts_alone_make_a_run_of_texts(mappings: list[str], fields: dict[str, str], texts: bool) -> None:
    assert are_plain_texts(mappings, FieldsSection(**fields)) == texts


@pytest.mark.parametrize(
    ("row", "prompt", "expected"),
    [
        ({"text": "The cat"}, "The cat", None),
        ({"text": "The cat</s>"}, "The cat", None),
        ({"text": "The cat", "question": "?", "answer": "no"}, "The cat", None),
        ({"prompt": "The cat"}, "The cat", None),
        ({"question": "The cat", "answer": " sat."}, "The cat", " sat."),
    ],
)
def test_rows_give_their_text_or_their_prompt(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path, row: Any, prompt: str, expected: str | None
) -> None:
    source, output = input_file(str(write_rows([row, {"other": "?"}]))), tmp_path / "out.jsonl"
    report = answer_file(session, source, output, SETTINGS, domain="a")
    line = json.loads(output.read_text())
    assert (line["prompt"], line["expected"]) == (prompt, expected)
    assert line["answer"] == answer(session, ids(session, prompt, "a"), SETTINGS)
    assert [item.row for item in report.passed_over] == [2] and "None" not in report.passed_over[0].reason


def test_parts_of_a_row_stand_a_line_each(session: Session) -> None:
    parts = [Message("system", "One."), Message("user", "Two.", "Three.")]
    assert session.prompt_ids(parts) == ids(session, "One.\nTwo.\nThree.")


def test_a_chat_remembers_nothing(session: Session) -> None:
    written: list[str] = []
    chat = Conversation(session, SETTINGS, written.append, "a")
    said = []
    for _ in range(2):
        written.clear()
        chat.handle_line("The cat")
        said.append("".join(written))
    assert said[0] == said[1] == answer(session, ids(session, "The cat", "a"), SETTINGS) + "\n"
