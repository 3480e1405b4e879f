"""The commands that are disturbed: what each needs, how it is called again, and what its result is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = "run"
FOLDER = f"outputs/experiments/default/runs/{RUN}"
TRAIN = (
    "train", "data.train=rows.jsonl", "data.validation=held.jsonl", "training.batch_size=4", "training.max_steps=5",
    "training.save_steps=2", "training.eval_steps=3", "training.lr=3e-3", "peft.r=4", "tracking.samples=1",
    "tracking.histograms_every=2", f"output.run_id={RUN}",
)  # fmt: skip
TIMES = ("seconds", "time", "per_second", "memory", "bytes", "started", "finished", "created", "date", "versions")

Result = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A command.

    `needs` names the state of the folder that it starts in; `again` is what a user types after it died, by default the
    same; `result` is read from the folder, the same for every undisturbed call.
    """

    name: str
    needs: str
    arguments: tuple[str, ...]
    result: Callable[[Path], Result]
    again: tuple[str, ...] = ()


def write_rows(folder: Path) -> None:
    """Rows to train on, and others to validate on."""
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
    values = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return hashlib.sha256(json.dumps(without_times(values), sort_keys=True).encode()).hexdigest()


def without_times(value: Any) -> Any:
    """The value without the keys that tell when and how fast."""
    if isinstance(value, dict):
        kept = {key: without_times(inner) for key, inner in value.items() if not any(t in key for t in TIMES)}
        return {key: inner for key, inner in kept.items() if key not in ("checksum", "crc", "run_dir")}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def trained(folder: Path) -> Result:
    """The adapter, the last optimizer state and every line of the losses."""
    state = ("artifacts/adapter/*.safetensors", "checkpoints/*/optimizer.safetensors", "artifacts/tokenizer/*")
    return hash_files(folder / FOLDER, state) | hash_values(folder / FOLDER, "logs/metrics.jsonl", "logs/samples.jsonl")


def prepared(folder: Path) -> Result:
    return hash_files(folder, ("outputs/data/default/*",))


def merged(folder: Path) -> Result:
    return hash_files(folder / FOLDER, ("artifacts/merged/*.safetensors", "artifacts/merged/*.jinja"))


def judged(folder: Path) -> Result:
    return hash_values(folder / FOLDER, "reports/compare.json", "reports/evaluation.json")


def answered(folder: Path) -> Result:
    return hash_files(folder, ("answers.jsonl",))


def exported(folder: Path) -> Result:
    return hash_files(folder / FOLDER, ("exports/*",))


def swept(folder: Path) -> Result:
    return hash_files(folder, ("outputs/**/best.yaml",))


def tagged(folder: Path) -> Result:
    return hash_files(folder / FOLDER, ("metadata/tags.json",))


INFER = ("infer", "--run", FOLDER, "--input", "held.jsonl", "--output", "answers.jsonl", "inference.max_new_tokens=4")
SWEEP = (
    "sweep", "sweep=lr", "data.train=rows.jsonl", "data.validation=held.jsonl", "training.max_steps=1",
    "training.batch_size=4", "sweep.trials=2", "peft.r=2",
)  # fmt: skip
CASES = {
    case.name: case
    for case in (
        Case("train", "rows", TRAIN, trained, ("train", "--resume", FOLDER)),
        Case("resume", "interrupted", ("train", "--resume", FOLDER), trained),
        Case("prepare", "rows", ("prepare", "data.train=rows.jsonl"), prepared),
        Case("infer", "finished", INFER, answered),
        Case("evaluate", "finished", ("evaluate", "--run", FOLDER), judged),
        Case("compare", "finished", ("compare", "--run", FOLDER), judged),
        Case("export", "finished", ("export", FOLDER, "--data-type", "loss"), exported),
        Case("merge", "finished", ("merge", "--run", FOLDER), merged),
        Case("tag", "finished", ("experiment", "tag", FOLDER, "good"), tagged),
        Case("sweep", "rows", SWEEP, swept),
    )
}
