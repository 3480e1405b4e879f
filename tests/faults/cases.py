"""The commands that are disturbed: what each needs, how it is called again, and what its result is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_models import save_tiny_model  # type: ignore[import-not-found]

RUN = "run"
FOLDER = f"outputs/experiments/default/runs/{RUN}"
TRAIN = (
    "train", "model.id=base", "data.train=rows.jsonl", "data.validation=held.jsonl", "training.batch_size=4",
    "training.max_steps=5", "training.save_steps=2", "training.eval_steps=3", "training.lr=3e-3", "peft.r=4",
    "tracking.samples=1", "tracking.histograms_every=2", f"output.run_id={RUN}",
)  # fmt: skip
TIMES = ("seconds", "time", "per_second", "memory", "bytes", "started", "finished", "created", "date", "versions")

Result = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A command.

    `needs` names the state of the folder that it starts in; `again` is what a user types after it died, by default the
    same; `result` is read from the folder and from what was printed, the same for every undisturbed call.
    """

    name: str
    needs: str
    arguments: tuple[str, ...]
    result: Callable[[Path, str], Result]
    again: tuple[str, ...] = ()
    looks_for_damage: bool = False  # its answer may be exit code 1


def write_inputs(folder: Path) -> None:
    """A tiny model, rows to train on, and others to validate on."""
    save_tiny_model(folder / "base", vocab_size=1024)
    for name, numbers in (("rows", range(20)), ("held", range(20, 24))):
        lines = [{"question": f"How many pears has {i}?", "answer": f"It has {i + 1} pears."} for i in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def hash_files(folder: Path, patterns: Iterable[str]) -> Result:
    """The sha256 of files, by their names in the folder."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def hash_values(folder: Path, *patterns: str) -> Result:
    """The sha256 of what JSON files hold, without times and what else differs from call to call."""
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {path.relative_to(folder).as_posix(): _hash_json(path) for path in found}


def _hash_json(path: Path) -> str:
    text = path.read_text()
    return _hash_values(
        [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    )


def _hash_values(values: Any) -> str:
    return hashlib.sha256(json.dumps(without_times(values), sort_keys=True).encode()).hexdigest()


def without_times(value: Any) -> Any:
    """The value without the keys that tell when and how fast."""
    if isinstance(value, dict):
        kept = {key: without_times(inner) for key, inner in value.items() if not any(t in key for t in TIMES)}
        return {key: inner for key, inner in kept.items() if key not in ("checksum", "crc", "run_dir")}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def trained(folder: Path, _: str) -> Result:
    """The adapter, the last optimizer state and every line of the losses."""
    state = ("artifacts/adapter/*.safetensors", "checkpoints/*/optimizer.safetensors", "artifacts/tokenizer/*")
    return hash_files(folder / FOLDER, state) | hash_values(folder / FOLDER, "logs/metrics.jsonl", "logs/samples.jsonl")


def files(*patterns: str) -> Callable[[Path, str], Result]:
    return lambda folder, _: hash_files(folder, patterns)


def values(*patterns: str) -> Callable[[Path, str], Result]:
    return lambda folder, _: hash_values(folder, *patterns)


def printed(_: Path, output: str) -> Result:
    """The JSON object on the last line, but for the list of the reports that are in the folder."""
    lines = output.strip().splitlines()
    return {"printed": _hash_values([{**json.loads(lines[-1]), "reports": None}])} if lines else {}


def reported(folder: Path, _: str) -> Result:
    """The page without the ids of its pictures, which are drawn by chance."""
    page = (folder / FOLDER / "reports/lens.html").read_text()
    return {"page": _hash_values(re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "id", page))}


def deleted(folder: Path, _: str) -> Result:
    return {"left": ", ".join(sorted(path.name for path in (folder / FOLDER).parent.iterdir()))}


INFER = ("infer", "--run", FOLDER, "--input", "held.jsonl", "--output", "answers.jsonl", "inference.max_new_tokens=4")
SWEEP = (
    "sweep", "sweep=lr", "model.id=base", "data.train=rows.jsonl", "data.validation=held.jsonl", "training.max_steps=1",
    "training.batch_size=4", "sweep.trials=2", "peft.r=2",
)  # fmt: skip
BENCHMARK = (
    "benchmark", "--run", FOLDER, "benchmark.batch_sizes=[1]", "benchmark.prompt_lengths=[8]",
    "benchmark.new_tokens=2", "benchmark.repetitions=1",
)  # fmt: skip
PREPARE = ("prepare", "data.train=rows.jsonl", "data.val_ratio=0.2")
FROM_PREPARED = (
    "train", "model.id=base", "data.train=outputs/data/default/train.jsonl",
    "data.validation=outputs/data/default/validation.jsonl",
    *(argument for argument in TRAIN[2:] if not argument.startswith("data.")),
)  # fmt: skip
EXPORT = ("export", FOLDER, "--data-type", "loss")
ONE_STEP = (
    "train", "model.id=base", "data.train=rows.jsonl", "training.batch_size=4", "training.max_steps=1",
    "training.save_steps=null", "tracking.samples=0", "tracking.tensorboard=false", "lens.enabled=false",
    f"output.run_id={RUN}",
)  # fmt: skip
JUDGED = values(f"{FOLDER}/reports/compare.json", f"{FOLDER}/reports/evaluation.json")
CASES = {
    case.name: case
    for case in (
        Case("train", "rows", TRAIN, trained, ("train", "--resume", FOLDER)),
        Case("resume", "interrupted", ("train", "--resume", FOLDER), trained),
        Case("train from a prepared folder", "prepared", FROM_PREPARED, trained, ("train", "--resume", FOLDER)),
        Case("train a step", "cached", ONE_STEP, files(f"{FOLDER}/artifacts/adapter/*.safetensors"),
             ("train", "--resume", FOLDER)),
        Case("validate", "rows", ("validate", *TRAIN[1:], "--json"), printed),
        Case("prepare", "rows", PREPARE, files("outputs/data/default/*")),
        Case("infer", "finished", INFER, files("answers.jsonl")),
        Case("evaluate", "finished", ("evaluate", "--run", FOLDER), JUDGED),
        Case("compare", "finished", ("compare", "--run", FOLDER), JUDGED),
        Case("baseline", "rows", ("baseline", "data.validation=held.jsonl", "--json"), printed),
        Case("benchmark", "finished", BENCHMARK, lambda folder, _: measured(folder)),
        Case("analyze", "finished", ("analyze", FOLDER, "--json"), printed),
        Case("report", "finished", ("report", FOLDER), reported),
        Case("export", "finished", EXPORT, files(f"{FOLDER}/exports/*"), (*EXPORT, "--force")),
        Case("merge", "finished", ("merge", "--run", FOLDER), files(f"{FOLDER}/artifacts/merged/*.safetensors",
                                                                    f"{FOLDER}/artifacts/merged/*.jinja")),
        Case("sync", "finished", ("sync", FOLDER, "--json"), printed),
        Case("doctor", "finished", ("doctor", FOLDER), lambda folder, _: {"files": "looked through"},
             looks_for_damage=True),
        Case("tag", "finished", ("experiment", "tag", FOLDER, "good"), files(f"{FOLDER}/metadata/tags.json")),
        Case("show", "finished", ("experiment", "show", FOLDER, "--json"), printed),
        Case("delete", "finished", ("experiment", "delete", FOLDER, "--yes"), deleted),
        Case("sweep", "rows", SWEEP, files("outputs/**/best.yaml")),
        Case("sweep, resumed", "swept", SWEEP, files("outputs/**/best.yaml")),
    )
}  # fmt: skip


def measured(folder: Path) -> Result:
    """Which cells a benchmark has: its numbers differ from call to call."""
    report = json.loads((folder / FOLDER / "reports/benchmark.json").read_text())
    return {"cells": str([(cell["model"], cell["batch_size"], cell["prompt_length"]) for cell in report["cells"]])}


def files_of(folder: Path) -> list[str]:
    """What the product wrote in a folder, by name: no locks, which are not read, and not the user's rows."""
    found = (path for path in sorted((folder / "outputs").rglob("*")) if path.is_file() and path.suffix != ".lock")
    return [path.relative_to(folder).as_posix() for path in found if path.stat().st_size]
