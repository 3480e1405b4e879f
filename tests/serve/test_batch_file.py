"""Files in OpenAI's batch format: each request has its line, bad ones an error, and a killed call goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from training_lens.cli import cli
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message
from training_lens.inference import batch
from training_lens.inference.generator import generate_answer
from training_lens.inference.session import Session
from training_lens.serve import batch_file

PROMPTS = [f"What is {i} plus 4?" for i in range(7)]


def write_request(index: int, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": PROMPTS[index]}]
    body = {"model": "lora", "messages": messages, "max_tokens": 8} | body
    return {"custom_id": f"request-{index}", "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batch, batch_file):
        monkeypatch.setattr(module, "WINDOW", 3)


@pytest.fixture
def infer(outputs: Path, tmp_path: Path) -> Callable[..., Any]:
    """`infer(rows, *options)`: the result of the command, and the lines that it wrote."""

    def run(rows: list[Any], *options: str) -> tuple[Any, list[dict[str, Any]]]:
        source, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
        source.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        place = ["--input", str(source), "--output", str(output), f"output.base_output_dir={outputs}"]
        result = CliRunner().invoke(cli, ["infer", "--run", "lora", *place, *options, "--json"])
        lines = output.read_text().splitlines() if output.exists() else []
        return result, [json.loads(line) for line in lines if line.endswith("}")]

    return run


def test_each_request_is_answered_as_alone_and_bad_ones_say_why(
    infer: Callable[..., Any], sessions: dict[str, Session]
) -> None:
    rows: list[Any] = [write_request(i) for i in range(7)]
    rows[1]["body"]["model"] = "gpt"
    rows[3] = "{not json"
    rows[4]["custom_id"] = "request-0"
    rows[5]["url"] = "/v1/embeddings"
    rows += [write_request(0, temperature=float("nan")) | {"custom_id": "hot"}]
    result, lines = infer(rows)
    assert result.exit_code == 0, result.output
    ids = ["request-0", "request-1", "request-2", None, "request-0", "request-5", "request-6", "hot"]
    assert [line["custom_id"] for line in lines] == ids
    failed = {i: line["error"]["code"] for i, line in enumerate(lines) if line["error"]}
    assert failed == {
        1: "model_not_found",
        3: "invalid_json",
        4: "invalid_value",
        5: "invalid_value",
        7: "invalid_json",
    }
    assert lines[1]["response"]["status_code"] == 404
    session = sessions["lora"]
    for i in (0, 2, 6):
        ids_of_prompt = session.prompt_ids([Message("user", PROMPTS[i])])
        wanted = generate_answer(session, ids_of_prompt, InferenceSection(max_new_tokens=8))
        choice = lines[i]["response"]["body"]["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (wanted.text, wanted.finish_reason)
    report = json.loads(result.stdout)
    assert (report["rows"], report["answered"]) == (8, 3)
    assert [skipped["row"] for skipped in report["passed_over"]] == [2, 4, 5, 6, 8]


def test_a_killed_call_goes_on_where_it_was(infer: Callable[..., Any], tmp_path: Path) -> None:
    rows = [write_request(i, temperature=1, n=2) for i in range(7)]
    _, whole = infer(rows)
    output = tmp_path / "answers.jsonl"
    for kept in (4, 6):
        text = output.read_text()
        cut = [*text.splitlines(keepends=True)[:kept], text.splitlines()[kept][:40]]
        output.write_text("".join(cut))
        result, lines = infer(rows)
        assert json.loads(result.stdout)["resumed"] == kept
        assert [answers(line) for line in lines] == [answers(line) for line in whole]
    before = output.read_bytes()
    for changed, options in (
        ([write_request(1), *rows[1:]], ()),
        (rows, ("inference.top_p=0.5", "inference.temperature=1")),
    ):
        result, _ = infer(changed, *options)
        assert result.exit_code == 2 and "line 1 does not answer" in result.output and output.read_bytes() == before


def answers(line: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in line["response"]["body"]["choices"]]


def test_a_file_without_an_answer_is_an_error_and_options_of_rows_are_refused(infer: Callable[..., Any]) -> None:
    result, lines = infer([write_request(0, model="gpt")])
    assert result.exit_code == 1 and "none of its 1 lines can be answered: There is no model 'gpt'" in result.output
    assert len(lines) == 1
    result, _ = infer([write_request(0)], "--base")
    assert result.exit_code == 2 and "OpenAI's batch format" in result.output
