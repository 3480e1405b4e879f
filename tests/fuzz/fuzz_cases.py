"""Fuzz cases by subject: each writes a changed input into a folder, and gives the call that reads it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fuzz_mutators import change_bytes, change_json, change_row, change_text, change_value, hostile_value
from fuzz_sandbox import Outcome, command, run_forked

Call = Callable[[], object]


@dataclass(frozen=True)
class World:
    """What cases change copies of: a finished run, the mirror that it was copied to, a sweep, a prepared folder."""

    run: Path
    mirror: Path
    sweep: Path
    prepared: Path


Case = Callable[[World, Path, random.Random], Call]

CONFIG: dict[str, Any] = {
    "model": {"id": "embedded", "device": "cpu"},
    "data": {"train": ["rows.jsonl"], "val_ratio": 0.1, "fields": {"instruction": "q", "output": "a"}},
    "peft": {"r": 8, "rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj", "v_proj"]},
    "training": {"lr": 1e-3, "epochs": 2, "scheduler": "cosine", "seed": 3},
    "sweep": {"space": {"peft.r": [4, 8], "training.lr": {"low": 1e-4, "high": 1e-2, "log": True}}},
    "tracking": {"tensorboard": False, "samples": 2},
    "output": {"experiment_name": "mine", "base_output_dir": "outputs"},
}
ROWS: list[dict[str, Any]] = [
    {"question": "What is it?", "answer": "A cat.", "domain": "animals"},
    {"question": "How many?", "answer": 3, "domain": "numbers"},
    {"question": "Why?", "answer": {"because": ["it is", None]}, "domain": "ä\n,\"'"},
]
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "{}"},
        {"role": "assistant", "content": "Fine."},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content|trim }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
JINJA = (
    *("{% for i in range(99999) %}", "{% for i in messages recursive %}", "{% endfor %}", "{% if x %}", "{% endif %}"),
    *("{% set ns = namespace(a=messages) %}", "{% set messages = [messages, messages] %}", "{{ 'a' * 99999999 }}"),
    *("{{ messages|tojson }}", "{{ m.__class__ }}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}"),
    *("{{ (messages ~ '')|replace('a', 'b' * 999) }}", "{% macro a() %}{{ a() }}{{ a() }}{% endmacro %}", "{{ a() }}"),
    *("{{ m.content.join(messages) }}", "{{ 9 ** (9 ** 9) }}", "{% generation %}", "{% endgeneration %}", "{#", "x"),
)
WORDS = ("=", "[", "]", "{", "}", ",", "'", '"', "\\", "..", "/", "~", "+", "-", "${", "\0", "null", "9" * 999)


def config_file(world: World, folder: Path, draw: random.Random) -> Call:
    from training_lens.config.compose import compose

    values, is_json = CONFIG, draw.random() < 0.4
    for _ in range(draw.choice((0, 1, 1, 3))):
        values = change_value(values, draw)
    file = folder / ("a.json" if is_json else "a.yaml")
    text = json.dumps(values) if is_json else yaml.safe_dump(json.loads(json.dumps(values)), allow_unicode=True)
    content = text.encode("utf-8", "surrogatepass")
    file.write_bytes(change_bytes(content, draw) if draw.random() < 0.4 else content)
    return lambda: compose([str(file)], [], None, None)


def arguments(world: World, folder: Path, draw: random.Random) -> Call:
    from training_lens.cli.common import load_config
    from training_lens.cli.options import CommandOptions

    words = [f"{section}.{key}={json.dumps(value)}" for section, keys in CONFIG.items() for key, value in keys.items()]
    chosen = [change_text(word, WORDS, draw) for word in draw.sample(words, draw.choice((1, 2, 4)))]
    if draw.random() < 0.5:
        return lambda: load_config(CommandOptions(overrides=chosen))
    name = change_text("20260101T000000Z-abcd", WORDS, draw)
    reading = draw.choice(("experiment show", "report", "analyze", "export", "experiment delete", "sync"))
    return command([*reading.split(), name, f"output.base_output_dir={folder}/outputs"])


def _rows(draw: random.Random) -> list[Any]:
    rows: list[Any] = [CHAT] * 3 if draw.random() < 0.4 else list(ROWS)
    for _ in range(draw.choice((0, 1, 1, 2))):
        rows = [change_value(row, draw) if draw.random() < 0.5 else row for row in rows]
    return rows


def data_file(world: World, folder: Path, draw: random.Random) -> Call:
    from training_lens.config.data_sections import DataSection
    from training_lens.data.source_reader import read_examples

    ending = draw.choice((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz", ".parquet.gz"))
    content = _table(draw) if "parquet" in ending else _text(ending, draw)
    content = change_bytes(content, draw) if draw.random() < 0.5 else content
    content = gzip.compress(content, 1) if ending.endswith(".gz") else content
    file = folder / f"rows{ending}"
    file.write_bytes(change_bytes(content, draw) if draw.random() < 0.2 else content)
    skips: Any = draw.choice(("error", "skip"))
    return lambda: list(read_examples([str(file)], "data.train", DataSection(on_bad_row=skips)))


def _text(ending: str, draw: random.Random) -> bytes:
    if ending.startswith(".json"):
        rows = _rows(draw)
        lines = json.dumps(rows) if ending == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        return lines.encode()
    written = io.StringIO()
    table = csv.writer(written, delimiter="," if ending.startswith(".csv") else "\t")
    table.writerow(ROWS[0])
    for row in ROWS:
        table.writerow([str(hostile_value(draw)) if draw.random() < 0.2 else value for value in row.values()])
    return written.getvalue().encode("utf-8", "surrogatepass")


def _table(draw: random.Random) -> bytes:
    kinds: list[Any] = [pa.timestamp("us"), pa.date32(), pa.duration("s"), pa.time64("us"), pa.decimal128(38, 2)]
    numbers = pa.array([2**40, 5, -(2**40)], pa.int64())
    try:
        values = numbers.cast(pa.int32()) if draw.random() < 0.1 else numbers.cast(draw.choice(kinds), safe=False)
    except pa.ArrowException:
        values = numbers
    columns = {"question": pa.array(["a", "b", None]), "answer": pa.array(["x", "y", "z"]), "more": values}
    if draw.random() < 0.3:
        columns["answer"] = values
    if draw.random() < 0.2:
        bad = [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(draw.randbytes(3))]
        columns["more"] = pa.Array.from_buffers(pa.string(), 3, bad)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


def _change_template(draw: random.Random) -> str:
    """Statements put between those that are there, some taken out, or letters changed anywhere."""
    if draw.random() < 0.2:
        return change_text(TEMPLATE, JINJA, draw)
    pieces = [piece for piece in re.split(r"({%.*?%}|{{.*?}})", TEMPLATE) if piece]
    for _ in range(draw.choice((1, 1, 2, 3))):
        place, gone = draw.randrange(len(pieces) + 1), draw.choice((0, 0, 0, 1))
        pieces[place : place + gone] = [draw.choice(JINJA)]
    return "".join(pieces)


def template(world: World, folder: Path, draw: random.Random) -> Call:
    from training_lens.data.jinja import JinjaTemplate, read_template_file

    file = folder / "chat.jinja"
    file.write_text(_change_template(draw), encoding="utf-8")

    def call() -> None:
        source = read_template_file(str(file))
        with _failures_of_templates():
            JinjaTemplate(source, {"eos_token": "</s>"}, date(2026, 1, 1)).render_chat(CHAT["messages"], CHAT["tools"])

    return call


@contextmanager
def _failures_of_templates() -> Iterator[None]:
    """A template is a foreign program, which may fail in any way: the renderer tells it, whatever it is."""
    from training_lens.errors import DatasetError

    try:
        yield
    except Exception as error:
        raise DatasetError(str(error)) from error


def _copy(source: Path, place: Path) -> Path:
    """A copy that costs nothing: files are linked, and those that are changed are written anew."""
    return Path(shutil.copytree(source, place, copy_function=os.link))


def _change_file(root: Path, files: list[Path], draw: random.Random) -> None:
    file = draw.choice(sorted(files))
    content = file.read_bytes()
    file.unlink()
    kind = draw.random()
    if kind < 0.1:
        return
    if kind < 0.15:
        file.symlink_to(draw.choice(("/dev/zero", "/etc/passwd", "../../../outside/witness", str(root))))
    elif kind < 0.2:
        os.mkfifo(file)
    elif file.suffix == ".json":
        file.write_bytes(change_json(content, draw))
    elif content:
        file.write_bytes(change_bytes(content, draw))


def run_folder(world: World, folder: Path, draw: random.Random) -> Call:
    """Any file of a run, read by commands that load no model."""
    run = _copy(world.run, folder / "outputs" / "experiments" / "default" / "runs" / world.run.name)
    _change_file(run, [file for file in run.rglob("*") if file.is_file()], draw)
    output = [f"output.base_output_dir={folder}/outputs"]
    commands = (["experiment", "list"], ["experiment", "show", run.name], ["report", run.name], ["analyze", run.name])
    return command([*draw.choice(commands), *output])


def adapter(world: World, folder: Path, draw: random.Random) -> Call:
    from training_lens.config.schema import PeftSection
    from training_lens.models.adapter_files import adapter_folder, adopt_saved_settings, require_finite, saved_shapes

    place = _copy(world.run / "artifacts" / "adapter", folder / "adapter")
    _change_file(place, [file for file in place.rglob("*") if file.is_file()], draw)

    def call() -> None:
        found = adapter_folder(str(place))
        adopt_saved_settings(PeftSection(from_adapter=str(place)))
        saved_shapes(found)
        require_finite(found)

    return call


def checkpoint(world: World, folder: Path, draw: random.Random) -> Call:
    from training_lens.training.loop.checkpoint_manager import CheckpointManager

    place = _copy(world.run / "checkpoints", folder / "checkpoints")
    _change_file(place, [file for file in place.rglob("*") if file.is_file()], draw)
    return lambda: CheckpointManager(place, "").find_newest_intact()


def mirror(world: World, folder: Path, draw: random.Random) -> Call:
    """A mirror's manifest and files, fetched to be read."""
    place = _copy(world.mirror, folder / "mirror")
    files = [file for file in place.rglob("*") if file.is_file()]
    manifests = [file for file in files if file.name == "mirror.json"]
    _change_file(place, manifests if draw.random() < 0.7 else files, draw)
    where = f"output.base_output_dir={folder}/outputs"
    return command(["report", place.as_uri(), where])


def study(world: World, folder: Path, draw: random.Random) -> Call:
    """A sweep's database, in its bytes or in a value of a table, opened and gone on with."""
    from training_lens.sweeps.leaderboard import build_leaderboard, recommend_trial
    from training_lens.sweeps.space import Space
    from training_lens.sweeps.study import SharedStudy
    from training_lens.sweeps.sweep_report import best_yaml
    from training_lens.sweeps.worker import Worker

    place, config = Path(shutil.copytree(world.sweep, folder / "sweep")), study_config()
    database = place / "study.db"
    if draw.random() < 0.3:
        database.write_bytes(change_bytes(database.read_bytes(), draw))
    else:
        change_row(database, draw)

    def call() -> None:
        space = Space.from_config(config)
        opened = SharedStudy(config, space, place, {})
        with opened.explain_lost_database(), Worker(place / "workers") as worker:
            opened.claim_trial(worker)
            trials = opened.current_trials()
            found = build_leaderboard(config.sweep.name, config.sweep.metric, trials, space)
            if chosen := recommend_trial(found, trials):
                best_yaml(found, chosen, config)

    return call


def study_config() -> Any:
    """The config of the sweep that cases change."""
    from training_lens.config.compose import validate_values

    space = {"peft.r": [4, 8], "training.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    return validate_values({"sweep": {"space": space, "trials": 9}})


def prepared(world: World, folder: Path, draw: random.Random) -> Call:
    """A prepared folder's rows and manifest, read as training and another `prepare` do."""
    from training_lens.config.data_sections import DataSection
    from training_lens.data.source_reader import read_examples
    from training_lens.data.sources import expand_sources
    from training_lens.preparation.prepare_splits import find_written_files

    place = _copy(world.prepared, folder / "prepared")
    _change_file(place, [file for file in place.rglob("*") if file.is_file()], draw)
    rows = str(place / "train.jsonl")

    def call() -> None:
        find_written_files(place)
        for source in expand_sources([rows], "data.train"):
            assert source.sha256
        assert list(read_examples([rows], "data.train", DataSection()))

    return call


SUBJECTS: dict[str, Case] = {
    "config files": config_file,
    "arguments": arguments,
    "data files": data_file,
    "templates": template,
    "run folders": run_folder,
    "adapters": adapter,
    "checkpoints": checkpoint,
    "mirrors": mirror,
    "studies": study,
    "prepared folders": prepared,
}


def run_case(world: World, subject: str, seed: int, place: Path) -> Outcome:
    """One case in a folder of its own, beside one that nothing may touch."""
    inside, outside = place / "inside", place / "outside"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
    (outside / "witness").write_text("untouched")
    try:
        call = SUBJECTS[subject](world, inside, random.Random(f"{subject} {seed}"))
        outcome = run_forked(call, inside)
        around = {file.name for file in place.iterdir()}, [file.read_text() for file in outside.iterdir()]
        is_kept = around == ({"inside", "outside"}, ["untouched"])
        return outcome if is_kept else Outcome("outside write", outcome.seconds, outcome.peak_bytes, outcome.told)
    finally:
        shutil.rmtree(place)
