"""A file of answers: each row its line, bad rows passed over, and killed and resumed equals uninterrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from slow_cases import mark_slow, slow_but

from training_lens.config.data_sections import DataSection
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message
from training_lens.data.source_reader import read_examples
from training_lens.data.templates import build_renderer
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.inference import batch
from training_lens.inference.batch import FileReport, answer_file, input_file, output_file
from training_lens.inference.generator import answer
from training_lens.inference.prompts import PromptReader, read_lines
from training_lens.inference.session import Session, open_run
from training_lens.runs.run_folder import RunFolder

SETTINGS = InferenceSection(max_new_tokens=6)
SAMPLED = InferenceSection(max_new_tokens=6, temperature=1.5, seed=3)
ROWS = [{"question": f"Where is box {i}{' and more' * (i % 3)}?", "answer": f"In {i}."} for i in range(10)]


@pytest.fixture(scope="module")
def session(finished_run: RunFolder) -> Session:
    return open_run(finished_run)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "WINDOW", 4)


def answered(session: Session, source: Path, output: Path, settings: InferenceSection = SETTINGS) -> FileReport:
    return answer_file(session, input_file(str(source)), output, settings, domain="hill")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_has_its_line_in_order(session: Session, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    report = answered(session, write_rows(ROWS), tmp_path / "out.jsonl")
    written = lines(tmp_path / "out.jsonl")
    assert (report.rows, report.answered, report.resumed, report.passed_over) == (10, 10, 0, ())
    assert [line["row"] for line in written] == list(range(1, 11))
    assert [line["prompt"] for line in written] == [row["question"] for row in ROWS]
    assert [line["expected"] for line in written] == [row["answer"] for row in ROWS]
    for line in written[3:6]:
        assert line["answer"] == answer(
            session, session.prompt_ids([Message("user", line["prompt"])], "hill"), SETTINGS
        )


@pytest.mark.parametrize("settings", [mark_slow(SETTINGS), SAMPLED], ids=["greedy", "sampled"])
def test_whatever_was_lost_is_written_again_byte_for_byte(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path, settings: InferenceSection
) -> None:
    source, output = write_rows(ROWS), tmp_path / "out.jsonl"
    answered(session, source, output, settings)
    whole = output.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size, kept in ((0, 0), (3, 0), (ends[0], 1), (ends[3], 4), (ends[4] + 20, 5), (ends[8], 9), (ends[9], 10)):
        output.write_bytes(whole[:size])
        assert answered(session, source, output, settings).resumed == kept
        assert output.read_bytes() == whole


IDS: dict[str, Any] = {"id": "case-7", "question_id": 81, "customId": "ü", "UUID": "a-b", "index": 0, "docid": 3}
IDS |= {"hash": "9f", "meta_id": {"a": 1}, "valid": "no id", "grid": 4}


def test_ids_of_rows_and_how_each_answer_ended_are_kept(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    source, output = write_rows([{**IDS, **ROWS[0]}, *ROWS[1:3]]), tmp_path / "out.jsonl"
    report = answered(session, source, output)
    whole = output.read_bytes()
    first, *others = lines(output)
    assert {key: first[key] for key in IDS if key in first} == {
        key: IDS[key] for key in ("id", "question_id", "customId", "UUID", "index", "hash")
    }
    assert not any(key in line for key in IDS for line in others)
    reasons = [line["finish_reason"] for line in (first, *others)]
    assert set(reasons) <= {"stop", "length"} and report.cut == reasons.count("length") > 0

    output.write_bytes(whole[: whole.index(b"\n") + 9])
    assert answered(session, source, output).cut == report.cut and output.read_bytes() == whole
    with pytest.raises(ConfigurationError, match="belongs to another input"):
        answered(session, write_rows([{**IDS, **ROWS[0], "id": "case-8"}, *ROWS[1:3]]), output)


def test_an_output_of_an_earlier_version_is_gone_on_with(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    source, output = write_rows([{"id": i, **row} for i, row in enumerate(ROWS[:3])]), tmp_path / "out.jsonl"
    answered(session, source, output)
    first, *others = output.read_text().splitlines()
    earlier = {key: value for key, value in json.loads(first).items() if key not in ("id", "finish_reason")}
    output.write_text(json.dumps(earlier) + "\n")
    report = answered(session, source, output)
    assert (report.resumed, report.unmarked) == (1, 1) and output.read_text().splitlines()[1:] == others


def test_a_finished_output_is_not_touched(session: Session, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    source, output = write_rows(ROWS), tmp_path / "out.jsonl"
    answered(session, source, output)
    before = output.stat().st_mtime_ns
    assert answered(session, source, output).resumed == 10
    assert output.stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["prompt", "order", "fewer", "domain", "no answers"])
def test_the_output_of_another_input_is_refused_and_left(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    output = tmp_path / "out.jsonl"
    answered(session, write_rows(ROWS[:6]), output)
    if change == "no answers":
        output.write_text("some text\n")
    before = output.read_bytes()
    other = {"prompt": [{**ROWS[0], "question": "?"}, *ROWS], "order": ROWS[::-1], "fewer": ROWS[:3]}.get(change, ROWS)
    reason = "lines more than" if change == "fewer" else "so it belongs to another input"
    with pytest.raises(ConfigurationError, match=f"{reason}.* The file is left as it is"):
        answer_file(
            session,
            input_file(str(write_rows(other))),
            output,
            SETTINGS,
            domain="lake" if change == "domain" else "hill",
        )
    assert output.read_bytes() == before


@pytest.mark.parametrize("content", [b'{"accuracy": 0.5}', b"notes", b'{"row": 2', "é".encode()[:1]])
@pytest.mark.parametrize("whole_lines", slow_but([4], [0, 4, 10]))
def test_a_last_line_without_end_that_is_not_ours_is_kept(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path, content: bytes, whole_lines: int
) -> None:
    source, output = write_rows(ROWS), tmp_path / "out.jsonl"
    answered(session, source, output)
    before = b"".join(output.read_bytes().splitlines(keepends=True)[:whole_lines]) + content
    output.write_bytes(before)
    with pytest.raises(ConfigurationError, match="The file is left as it is: give another one"):
        answered(session, source, output)
    assert output.read_bytes() == before


def retrained(session: Session, folder: Path) -> Session:
    """The session with another adapter of the same name and shapes."""
    shutil.copytree(str(session.adapter), folder)
    weights = {name: tensor + 1 for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors")
    return replace(session, adapter=folder)


def test_answers_of_another_model_or_settings_are_refused_and_left(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    source, output = write_rows(ROWS), tmp_path / "out.jsonl"
    answered(session, source, output, SAMPLED)
    before = output.read_bytes()
    alpaca = session.config.replace_keys(data={"template": "alpaca"})
    others: list[tuple[Session, InferenceSection, bool]] = [
        (session, SAMPLED.model_copy(update={key: value}), False)
        for key, value in (("max_new_tokens", 7), ("temperature", 1.0), ("seed", 4), ("top_p", 0.5), ("top_k", 3))
    ]
    others += [(session, SAMPLED, True), (retrained(session, tmp_path / "other"), SAMPLED, False)]
    others += [(replace(session, renderer=build_renderer(alpaca.data, session.tokenizer)), SAMPLED, False)]
    for other, settings, base in others:
        with pytest.raises(ConfigurationError, match=r"line 1 answers row 1 of .*, but with other inputs than now"):
            answer_file(other, input_file(str(source)), output, settings, domain="hill", base=base)
    assert output.read_bytes() == before


def test_settings_that_decide_nothing_go_on(session: Session, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    source, output = write_rows(ROWS), tmp_path / "out.jsonl"
    answered(session, source, output)
    moved = replace(session, adapter=shutil.copytree(str(session.adapter), tmp_path / "moved"))
    assert answered(moved, source, output, InferenceSection(max_new_tokens=6, seed=9, batch_tokens=99)).resumed == 10


def test_the_same_prompt_in_another_conversation_is_refused(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    answered(session, write_rows([{"messages": [{"role": "system", "content": "Be brief."}, USER]}]), output)
    with pytest.raises(ConfigurationError, match="the messages before the prompt have changed"):
        answered(session, write_rows([{"messages": [{"role": "system", "content": "Be long."}, USER]}]), output)


def test_end_marks_are_taken_off_earlier_answers_as_in_training(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    def key(said: str, session: Session = session) -> Any:
        rows = [{"messages": [USER, {**SAID, "content": said}, USER, {**SAID, "content": said}]}]
        output = tmp_path / f"{said.strip('</s>')}{len(list(tmp_path.iterdir()))}.jsonl"
        answered(session, write_rows(rows), output)
        return lines(output)[0]["key"], lines(output)[0]["expected"]

    keeps = replace(session, config=session.config.replace_keys(data={"strip_end_marks": False}))
    assert key("Yes.</s>") == key("Yes.") == key("Yes.", keeps)
    assert key("Yes.</s>", keeps) != key("Yes.") and key("Yes.</s>", keeps)[1] == "Yes.</s>"


def test_bad_rows_are_passed_over_with_their_reason(session: Session, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    good = json.dumps({"question": "Hi?", "domain": "lake"})
    bad = ['{"question": "Hi', '["a"]', '{"domain": "hill"}', '{"question": "Hi", "domain": "moon"}']
    bad += ['{"question": "\\ufdd2", "domain": "hill"}']
    bad += [json.dumps({"question": "long " * 900, "domain": "hill"}), '{"question": "\\ud800", "domain": "hill"}']
    source.write_text("\n".join([good, *bad, "", good]))
    report = answer_file(session, input_file(str(source)), tmp_path / "out.jsonl", SETTINGS)
    assert [item.row for item in report.passed_over] == [2, 3, 4, 5, 6, 7, 8]
    reasons = ["broken JSON", "is a list", "has no field 'question'", "domain 'moon'", "a noncharacter"]
    reasons += ["no room to answer", "half a surrogate pair"]
    for item, reason in zip(report.passed_over, reasons, strict=True):
        assert reason in item.reason
    written = lines(tmp_path / "out.jsonl")
    assert [(line["row"], line["domain"], line["expected"]) for line in written] == [
        (1, "lake", None),
        (10, "lake", None),
    ]


def test_nothing_to_answer_is_an_error_and_leaves_no_file(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(DatasetError, match="none of its 2 rows can be answered"):
        answered(session, write_rows([{"question": ""}, {"question": None}]), output)
    with pytest.raises(DatasetError, match="holds no rows"):
        answered(session, write_rows([]), output)
    assert not output.exists()


USER, SAID = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("row", "prompt", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2"}, "Add.\n1 2", None),
        ({"prompt": "Hi?", "completion": "Yes."}, "Hi?", "Yes."),
        ({"messages": [USER]}, "Hi?", None),
        ({"messages": [USER, SAID]}, "Hi?", "Yes."),
        ({"messages": [USER, SAID, {"role": "user", "content": "So?"}]}, "So?", None),
    ],
)
def test_every_format_of_training_is_read_with_and_without_answers(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path, row: Any, prompt: str, expected: str | None
) -> None:
    for name in ("rows.jsonl", "rows.json"):
        output = tmp_path / f"{name}.out"
        answered(session, write_rows([row], name), output)
        assert [(line["prompt"], line["expected"]) for line in lines(output)] == [(prompt, expected)]


def test_unusable_outputs_are_refused_before_any_work(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    source = write_rows(ROWS)
    for name, message in (
        (str(source), "is the input itself"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "no/out.jsonl"), "there is no folder"),
        ("/proc/out.jsonl", "cannot write in '/proc'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            output_file(name, input_file(str(source)))


@pytest.mark.slow
def test_rows_have_the_domains_that_the_run_has(
    session: Session, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    source = write_rows([{"question": "Hi?", "domain": "hill"}], "lake.jsonl")
    per_file = session.config.replace_keys(data={"domain": {"field": None, "per_file": True}})
    elsewhere = session.config.replace_keys(data={"domain": {"field": "topic"}})
    for i, (changed, wanted) in enumerate(
        (
            (session, "hill"),
            (replace(session, domains=()), None),  # trained without: a column of that name is none of ours
            (replace(session, domains=None), "hill"),
            (replace(session, config=per_file), "lake"),
            (replace(session, config=elsewhere), None),  # the run's own field is not in this file
        )
    ):
        output = tmp_path / f"{i}.jsonl"
        answer_file(changed, input_file(str(source)), output, SETTINGS)
        assert [line["domain"] for line in lines(output)] == [wanted]


@pytest.mark.parametrize("has_answer", [True, False])
def test_rows_with_earlier_turns_and_tools_are_asked_as_they_are_trained(
    session: Session, write_rows: Callable[..., Path], has_answer: bool
) -> None:
    tool = {"name": "find", "description": "Looks for it.", "parameters": {"type": "object"}}
    around = {"system": "Be brief.", "history": [["Who?", "Tom."]], "tools": [tool], "loss_mask": 0}
    asked = {"role": "user", "content": "Where?"}
    forms = [{"instruction": "Where?"}, {"messages": [asked]}, {"prompt": [asked]}]
    for form in forms:
        chat = "messages" in form
        answer = {"messages": [asked, {"role": "assistant", "content": "There."}]} if chat else {"output": "There."}
        trained = write_rows([{**form, **around, **answer}], "trained.jsonl")
        (example,) = read_examples([str(trained)], "data.train", DataSection(train=[str(trained)]))
        source = input_file(str(write_rows([{**form, **around, **(answer if has_answer else {})}], "asked.jsonl")))
        rows = read_lines(source, DataSection())
        (question,), _ = PromptReader(session, rows, source, None, "").read_prompts(rows)
        assert question.ids == session.encoder.encode_prompt(session.renderer.render_example_prompt(example))
        assert question.expected == ("There." if has_answer else None)
