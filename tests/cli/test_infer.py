"""`infer`: one way of asking at a time, files that survive a kill, and a chat that is typed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from training_lens.runs.run_folder import RunFolder

Call = Callable[..., Result]
SHORT = "inference.max_new_tokens=4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt given: give one of PROMPT, --input FILE --output FILE, --interactive"),
        (["inference=base"], "no prompt given"),
        (["Hi", "--interactive"], "the prompt 'Hi' and --interactive given"),
        (["Hi", "--input", "a", "--output", "b"], "the prompt 'Hi' and --input given"),
        (["--input", "a.jsonl"], "--input and --output go together"),
        (["Hi", "--output", "b"], "--input and --output go together"),
        (["--interactive", "--json"], "--interactive has no --json"),
        (["  "], "the prompt is empty"),
        (["Hi", "--run", "x", "inference.adapter=y"], "both name an adapter"),
        (["Hi", "inference=manual"], "inference.adapter: no adapter is named"),
        (["Hi", "model.id=x"], "model.id=x: a run answers with its own config."),
        (["Hi", "inference=base", "training.lr=1"], "training.lr=1: "),
    ],
)
def test_wrong_usage_is_said_and_exits_with_2(call: Call, arguments: list[str], message: str) -> None:
    result = call("infer", *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_the_base_alone_needs_no_run(call: Call) -> None:
    result = call("infer", "Where is 2 = 1 + 1?", "inference=base", SHORT, "--domain", "anything", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["run"], answer["domain"]) == ("embedded", "anything")
    plain = call("infer", "Where is 2 = 1 + 1?", "inference=base", SHORT, "--domain", "anything")
    assert answer["answer"].strip() in plain.stdout


def test_a_file_is_answered_resumed_and_reported(call: Call, finished_run: RunFolder) -> None:
    Path("rows.jsonl").write_text('{"question": "A?"}\n{"question": \n{"question": "B?"}\n')
    asked = ["infer", "--input", "rows.jsonl", "--output", "out.jsonl", "--run", str(finished_run.root), SHORT]
    first = call(*asked, "--domain", "hill", "--json")
    assert first.exit_code == 0, first.stderr
    report = json.loads(first.stdout)
    assert (report["output"], report["rows"], report["answered"], report["resumed"]) == ("out.jsonl", 3, 2, 0)
    assert report["cut"] == 2
    assert report["passed_over"][0]["row"] == 2 and "rows.jsonl, row 2 passed over" in first.stderr
    again = call(*asked, "--domain", "hill")
    assert "is finished: all 2 answers are there, nothing was changed; 1 row passed over." in again.stdout
    assert "2 of the 2 answers were cut (finish_reason length)" in again.stdout
    assert call(*asked, "--domain", "hil").exit_code == 2
    Path("bad.jsonl").write_text('{"question": ""}\n')
    assert call(*asked, "--input", "bad.jsonl", "--output", "other.jsonl").exit_code == 1


@pytest.mark.slow
def test_killed_and_run_again_equals_uninterrupted(call: Call, finished_run: RunFolder, tmp_path: Path) -> None:
    rows = [{"question": f"Where is box {i}?", "domain": "hill"} for i in range(300)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--run", str(finished_run.root), SHORT, "inference.temperature=1", "inference.batch_tokens=1024"]
    killed = ["infer", "--input", "rows.jsonl", "--output", "killed.jsonl", *settings]
    output = tmp_path / "killed.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "training_lens", *killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not output.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    written = output.read_bytes().count(b"\n")
    assert written < 300
    resumed = json.loads(call(*killed, "--json").stdout)
    assert (resumed["answered"], resumed["resumed"]) == (300, written)
    call("infer", "--input", "rows.jsonl", "--output", "whole.jsonl", *settings)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_chat_is_typed_and_left(call: Call, finished_run: RunFolder) -> None:
    asked = ["infer", "--interactive", "--run", str(finished_run.root), SHORT, "--domain", "hill"]
    left = call(*asked, input="Where is it?\n/base\nWhere is it?\n\n/quit\nnever read\n")
    assert left.exit_code == 0
    assert "/help lists the commands" in left.stdout and "now the base answers." in left.stdout
    assert left.stdout.count("> ") == 5
    assert call(*asked, input="Hi?").exit_code == 0  # ends like Ctrl-D


def test_a_run_on_plain_texts_says_that_it_continues(call: Call, text_run: RunFolder) -> None:
    asked = ["infer", "--run", str(text_run.root), SHORT, "--domain", "a"]
    one = call(*asked[:1], "The cat", *asked[1:], "--json")
    assert one.exit_code == 0 and "it continues yours, each by itself, without a template" in one.stderr
    chat = call(*asked, "--interactive", input="The cat\nThe cat\n")
    assert "it continues yours" in chat.stdout
    assert chat.stdout.count(json.loads(one.stdout)["answer"].strip()) == 2


NO_TEXT = ["a \udcff", "\ufdd0", "a \ufdd2"]


@pytest.mark.parametrize("text", NO_TEXT)
def test_what_is_no_text_is_one_line(call: Call, text: str) -> None:
    base = ["inference=base", SHORT]
    asked = call("infer", text, *base)
    assert (asked.exit_code, "the prompt holds U+" in asked.stderr) == (2, True)
    assert call("infer", "Hi", *base, "--domain", text).exit_code == 2


def test_what_is_no_text_is_said_and_the_chat_goes_on(call: Call) -> None:
    typed = "".join(f"{text}\n" for text in [*NO_TEXT, "Hi"]).encode(errors="surrogateescape")
    chat = call("infer", "--interactive", "inference=base", SHORT, input=typed)
    assert (chat.exit_code, chat.stderr) == (0, "")
    assert chat.stdout.count("the prompt holds U+") == 3 and chat.stdout.count("> ") == 5
