"""A journal is read once, in order, while it is written, and through a resume."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from training_lens.runs.journal import Journal, JournalPosition, JournalReader
from training_lens.runs.metrics_log import read_metrics
from training_lens.utils.integrity import seal_line


def write(path: Path, steps: list[int], after: int = 0) -> None:
    journal = Journal(path)
    journal.open(after)
    for step in steps:
        journal.write({"step": step, "after": after})
    journal.close()


def steps(reader: JournalReader) -> list[int]:
    return [entry.step for entry in reader.read(100)]


def test_what_was_read_does_not_come_again(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    reader = JournalReader(path)
    assert steps(reader) == []
    journal = Journal(path)
    journal.open(after=0)
    journal.write({"step": 0})
    journal.write({"step": 1})
    assert steps(reader) == [0, 1] and steps(reader) == []
    journal.write({"step": 1})
    journal.write({"step": 2})
    assert steps(reader) == [1, 2]
    journal.close()


def test_a_new_reader_goes_on_from_a_position(tmp_path: Path) -> None:
    write(tmp_path / "j.jsonl", [0, 1, 2, 2, 3])
    first = JournalReader(tmp_path / "j.jsonl")
    assert [entry.position for entry in first.read(3)][-1] == JournalPosition(2, 1)
    assert steps(JournalReader(tmp_path / "j.jsonl", first.position)) == [2, 3]


def test_a_line_being_written_waits_and_a_broken_one_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 2}\n{"step": 3')
    reader = JournalReader(path)
    assert steps(reader) == [1, 2]
    with path.open("a") as file:
        file.write("}\n")
    assert steps(reader) == [3]


def test_lines_that_a_resume_writes_again_come_once(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, [0, 1, 2, 3])
    reader = JournalReader(path)
    assert steps(reader) == [0, 1, 2, 3]
    write(path, [2, 3, 4], after=1)
    assert [(entry.step, entry.values["after"]) for entry in reader.read(100)] == [(4, 1)]
    assert [line.split(":")[1][:2] for line in path.read_text().splitlines()] == [" 0", " 1", " 2", " 3", " 4"]


def read_losses(reader: JournalReader) -> list[tuple[int, float]]:
    """The step and loss of all lines: as tables where the reader has them, else one by one."""
    found: list[tuple[int, float]] = []
    while True:
        if (table := reader.read_table(["loss"])) is not None:
            found += zip(table.steps.tolist(), table.columns["loss"].tolist(), strict=True)
        elif entries := reader.read(100):
            found += [(entry.step, float(entry.values["loss"] or math.nan)) for entry in entries]
        else:
            return found


def test_a_long_journal_read_as_tables_is_the_same_line_by_line(tmp_path: Path) -> None:
    path, word = tmp_path / "metrics.jsonl", "x" * 200
    numbers = [step // 3 for step in range(12_000)]  # several lines a step, also where one table ends
    lines = [seal_line({"kind": "step", "step": n, "loss": n / 7 if n % 5 else None, "word": word}) for n in numbers]
    lines[300] = lines[300].replace("step", "stop", 1)  # damaged
    lines[5000] = seal_line({"step": "1666", "loss": 1.0})
    lines[9000] = json.dumps({"step": 3000, "loss": 2})  # of an earlier version
    path.write_text("\n".join(lines))
    reader = JournalReader(path)
    found = read_losses(reader)
    expected = [(entry.step, float(entry.values["loss"] or math.nan)) for entry in JournalReader(path).read(20_000)]
    assert len(expected) == 11_997 and repr(found) == repr(expected)  # the last line has no end yet
    assert reader.position == JournalPosition(3999, 2)
    fresh = JournalReader(path)
    assert fresh.read_table(["loss"]) is None and fresh.read(301) and fresh.read_table(["loss"]) is not None
    resumed = tmp_path / "resumed.jsonl"
    resumed.write_text("\n".join([*lines[:10_000], seal_line({"step": 4000, "loss": 3.0}), ""]))
    resumed.replace(path)
    assert read_losses(reader) == [(4000, 3.0)]


def test_a_run_that_starts_over_begins_its_journal_anew(tmp_path: Path) -> None:
    write(tmp_path / "j.jsonl", [0, 1, 2])
    write(tmp_path / "j.jsonl", [0])
    assert [entry.step for entry in JournalReader(tmp_path / "j.jsonl").read(100)] == [0]


def test_a_line_says_when_it_was_written(tmp_path: Path) -> None:
    before = time.time()
    write(tmp_path / "j.jsonl", [1])
    (entry,) = JournalReader(tmp_path / "j.jsonl").read(1)
    assert before - 0.001 <= entry.values["time"] <= time.time() + 0.001


def test_a_full_disk_is_raised_where_it_is_written_and_not_again_at_the_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.open(after=0)
    journal.close()
    journal._file = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        journal.write({"step": 1})
    journal.close()


def test_no_flipped_bit_of_a_line_is_ever_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.open(after=0)
    for step in range(1, 4):
        journal.write({"step": step, "loss": 1.5 * step, "nan": math.nan, "name": "é"})
    journal.close()
    whole = journal.path.read_bytes()
    lines = read_metrics(journal.path)
    assert [line["step"] for line in lines] == [1, 2, 3] and "crc" not in lines[0]
    for bit in range(0, 8 * len(whole), 3):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        journal.path.write_bytes(content)
        for found in (read_metrics(journal.path), [dict(e.values) for e in JournalReader(journal.path).read(9)]):
            assert {line["step"]: line["loss"] for line in found}.items() <= {1: 1.5, 2: 3.0, 3: 4.5}.items()


def test_a_resume_says_that_its_journal_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for after, said in ((0, ""), (3, "is missing: it starts again after step 3")):
        (tmp_path / "samples.jsonl").unlink(missing_ok=True)
        journal = Journal(tmp_path / "samples.jsonl")
        journal.open(after=after)
        journal.close()
        assert said in caplog.text and bool(caplog.text) == bool(said)


def test_a_resume_names_the_damaged_lines_that_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "samples.jsonl"
    for flipped, said in ((2, "its lines 2 are skipped"), (4, "")):  # the last one a kill may have cut short
        caplog.clear()
        write(path, [1, 2, 3, 4])
        lines = path.read_text().splitlines(keepends=True)
        lines[flipped - 1] = lines[flipped - 1].replace("step", "stop")
        path.write_text("".join(lines))
        write(path, [], after=4)
        assert said in caplog.text and bool(caplog.text) == bool(said)
        assert len(path.read_text().splitlines()) == 3


def test_a_number_that_is_not_finite_is_null_to_strict_readers(tmp_path: Path) -> None:
    """Such as the norm of a step that loss scaling skips."""
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.open(after=0)
    journal.write({"step": 1, "grad_norm": math.inf, "losses": [math.nan, 2.0]})
    journal.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    line = json.loads(journal.path.read_text(), parse_constant=refuse)
    assert (line["grad_norm"], line["losses"]) == (None, [None, 2.0])
    assert [entry.values["losses"] for entry in JournalReader(journal.path).read(100)] == [[None, 2.0]]
