"""Inputs that would cause work without end are refused within seconds, by errors of ours."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training_lens.config.compose import compose
from training_lens.config.config_files import parse_config_file
from training_lens.config.data_sections import DataSection
from training_lens.config.search_space import parse_space
from training_lens.data.source_reader import read_examples
from training_lens.errors import TrainingLensError
from training_lens.utils.files import read_json
from training_lens.utils.limits import NESTING, is_too_deep

ROW = b'{"question": "a", "answer": "b"}\n'
DEEP = b'{"a":' * 900 + b"1" + b"}" * 900


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < 5


def read(path: Path) -> int:
    return sum(1 for _ in read_examples([str(path)], "data.train", DataSection()))


def many_keys() -> bytes:
    return b"".join(
        json.dumps({"question": "a", "answer": "b", **{f"k{i}_{j}": 1 for j in range(200)}}).encode() + b"\n"
        for i in range(600)
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wide.csv", lambda: ",".join(map(str, range(100_001))).encode() + b"\n", "names 100,001 columns"),
        ("keys.jsonl", many_keys, "over 100,000 different keys"),
        ("line.jsonl", lambda: ROW + b'{"question": "' + b"x " * 9_000_000 + b'"}\n', "line 2: has over 16,777,216"),
        ("line.csv", lambda: b'question,answer\na,"' + b"x " * 9_000_000 + b'"\n', "has a line of over 16,777,216"),
        ("empty.jsonl", lambda: ROW * 2 + b"\n" * 1_000_002, "over 1,000,000 empty lines"),
        ("deep.jsonl", lambda: ROW + b'{"question": "a", "answer": ' + DEEP + b"}\n", "row 2: .* over 100 deep"),
        ("deep.json", lambda: b"[" * 100_000, "cannot be read"),
        ("digits.jsonl", lambda: ROW + b'{"question": "a", "answer": ' + b"9" * 9999 + b"}\n", "cannot be read"),
        ("values.json", lambda: b"1 " * 100_002, "over 100,000 rows"),
        ("bomb.jsonl.gz", lambda: gzip.compress(b" " * 90_000_000, 1), "unpacks to over"),
        ("bomb.parquet.gz", lambda: gzip.compress(b"PAR1" + b"\0" * 90_000_000, 1), "unpacks to over"),
    ],
)
def test_a_file_of_rows_over_a_limit_is_refused(
    tmp_path: Path, name: str, content: Callable[[], bytes], message: str
) -> None:
    (tmp_path / name).write_bytes(content())
    with pytest.raises(TrainingLensError, match=message):
        read(tmp_path / name)


def test_arguments_in_text_are_read_as_those_beside_them(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": (b"[" * 9000).decode()}}]}
    row = {"messages": [{"role": "user", "content": "a"}, call], "tools": [{"name": "f"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(TrainingLensError, match=r"arguments in JSON.*nested over 100 deep"):
        read(tmp_path / "rows.jsonl")


def test_a_number_too_large_for_a_float_is_a_number_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"question": ' + b"9" * 400 + b', "answer": "b"}\n')
    assert read(tmp_path / "rows.jsonl") == 1
    with pytest.raises(TrainingLensError, match="low: given"):
        parse_space(compose([], ["sweep.space.training.lr={low: " + "9" * 400 + ", high: 1}"], None, None))


@pytest.mark.parametrize("name", ["zero.jsonl", "zero.csv", "zero.parquet", "pipe.jsonl", "pipe.json.gz"])
def test_devices_and_pipes_are_no_files(tmp_path: Path, name: str) -> None:
    if name.startswith("zero"):
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / name)
    for given in (name, f"*{name[4:]}"):
        with pytest.raises(TrainingLensError):
            read(tmp_path / given)
    with pytest.raises(OSError, match="expected a file"):
        read_json(tmp_path / name)
    with pytest.raises(TrainingLensError, match="expected a file"):
        parse_config_file(str(tmp_path / name), "--config")


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**62, 1], pa.int64()).cast(pa.timestamp("us")),
        pa.array([2**30, 1], pa.int32()).cast(pa.date32()),
        pa.array([2**62, 1], pa.int64()).cast(pa.duration("s")),
        pa.Array.from_buffers(
            pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
        ),
    ],
)
def test_parquet_values_that_python_cannot_hold_are_told(tmp_path: Path, values: pa.Array) -> None:
    pq.write_table(pa.table({"question": ["a", "b"], "answer": values}), tmp_path / "rows.parquet")
    with pytest.raises(TrainingLensError, match=r"rows\.parquet: holds a value that cannot be read"):
        read(tmp_path / "rows.parquet")


def alias_bomb() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


def alias_ladder() -> str:
    return "a0: &a0 [x]\n" + "\n".join(f"a{i + 1}: &a{i + 1} [*a{i}]" for i in range(400))


def merge_bomb() -> str:
    pairs = zip("abcde", "bcdef", strict=True)
    return "a: &a {x: 1}\n" + "\n".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 50)}]}}" for a, b in pairs)


def reference_bomb() -> str:
    pairs = zip("bcdefghij", "abcdefghi", strict=True)
    return "\n".join([f"{a}: {f'${{{b}}}' * 10}" for b, a in pairs] + ["j: xxxxxxxxxxxxxxxx"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", alias_bomb(), "over 50,000 values"),
        ("a.yaml", merge_bomb(), "over 50,000 values"),
        ("a.yaml", reference_bomb(), "over 524,288 characters"),
        ("a.yaml", "a: ${b}\nb: ${a}", "ecursive"),
        ("a.yaml", "data: " + "[" * 9000, "over 30 deep"),
        ("a.yaml", "data: " + "[{a: " * 40 + "1" + "}]" * 40, "over 30 deep"),
        ("a.yaml", alias_ladder(), "over 30 deep"),
        ("a.yaml", "training: {max_steps: " + "9" * 9999 + "}", "digits"),
        ("a.yaml", "a: " + "x" * 600_000, "over 524,288 bytes"),
        ("a.json", '{"data":' * 9_999, "over 100 deep"),
        ("a.json", '{"training": {"max_steps": ' + "9" * 9999 + "}}", "digits"),
    ],
)
def test_a_config_file_over_a_limit_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TrainingLensError, match=message):
        compose([str(tmp_path / name)], [], None, None)


@pytest.mark.parametrize(
    "words",
    [
        ["peft.rank_pattern=" + "{a:" * 500 + "1" + "}" * 500],
        ["training.max_steps=" + "9" * 99_999],
        ["sweep.space.training.seed=[" + ",".join(map(str, range(2000))) + "]"],
        [f"section{i}.key=1" for i in range(300)],
    ],
)
def test_words_of_the_command_line_over_a_limit_are_refused(words: list[str]) -> None:
    with pytest.raises(TrainingLensError) as refused:
        parse_space(compose([], words, None, None))
    assert str(refused.value).count("\n") <= 52


def test_references_and_aliases_of_real_configs_are_followed(tmp_path: Path) -> None:
    text = "output: {experiment_name: mine}\nmodel: &m {id: 'path/${output.experiment_name}'}\nlens: {enabled: false}"
    (tmp_path / "a.yaml").write_text(text)
    assert parse_config_file(str(tmp_path / "a.yaml"), "--config")["model"] == {"id": "path/mine"}


def test_nesting_is_counted_in_levels_not_in_values() -> None:
    value: object = 1
    for _ in range(NESTING - 1):
        value = [value, {"b": 1}]
    assert not is_too_deep(value) and is_too_deep([value]) and not is_too_deep("[" * 200)
