"""The planted suite: runs with a known fault, and healthy ones, and what the package says of each.

    python benchmarks/planted/run_planted.py [--seconds 280] [--only NAME ...] [--parts reported tuned controls]
        [--seeds 0 1 2] [--data-sets gsm8k t0] [--runs outputs/planted/runs.jsonl] [--again]

Each trial is planned, trained and analyzed in this process, on one core. A line of JSON per finished trial goes to
--runs, by part, kind, data set, seed and commit; trials that stand there for this commit (or for any with --any-commit)
are left out, so that the suite can be run in pieces. `summarize_planted.py` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from planted_case import Case
from planted_rows import DATA_SETS, healthy_case
from planted_suite import CONTROLS, KINDS
from planted_trial import Transcript, run_trial, scratch_folder
from verdicts import judge_trial

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "outputs/planted/runs.jsonl"
PARTS = ("reported", "tuned", "controls")
ROUNDS = (("reported", 0), ("controls", 20), ("reported", 1), ("reported", 2), ("tuned", 10))


class TrialKey(NamedTuple):
    """Which trial: the part, the kind's or control's name, data set and seed."""

    part: str
    name: str
    data_set: str
    seed: int


def list_trials(parts: list[str], seeds: list[int] | None, data_sets: list[str], only: list[str]) -> Iterator[TrialKey]:
    """All trials, so that the first ones cover every kind and every control."""
    for part, seed in ROUNDS:
        if part not in parts or (seeds is not None and seed not in seeds):
            continue
        if part == "controls":
            yield from (TrialKey(part, name, "", seed) for name in CONTROLS if not only or name in only)
            continue
        for data_set in data_sets:
            yield from (TrialKey(part, name, data_set, seed) for name in KINDS if not only or name in only)


def build_case(key: TrialKey, scratch: Path) -> Case:
    """The trial's case, with its fault."""
    if key.part == "controls":
        return CONTROLS[key.name].build(key.seed, scratch)
    kind = KINDS[key.name]
    healthy = healthy_case(key.data_set, key.seed, scratch)
    case = kind.plant(healthy, kind.reported if key.part == "reported" else kind.tuned)
    return replace(case, is_planned=kind.earliest == "before")


def is_detected(key: TrialKey, transcript: Transcript) -> bool:
    """Whether a planted fault is found already, so that nothing needs to be trained."""
    return key.part != "controls" and judge_trial(KINDS[key.name], asdict(transcript)).outcome == "before"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The finished trials."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def read_commit() -> str:
    """The last commit that changed the package, with a mark where the package differs from it."""
    commit = _git("log", "-1", "--format=%h", "--", "src")
    return commit + ("+" if _git("status", "--porcelain", "src") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no trial after so many seconds")
    parser.add_argument("--only", nargs="*", default=[], help="names of kinds and controls")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--data-sets", nargs="*", default=list(DATA_SETS))
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--any-commit", action="store_true", help="leave out trials that any commit has finished")
    return parser.parse_args()


def main() -> None:
    import torch

    torch.set_num_threads(1)
    args, commit, began = parse_arguments(), read_commit(), time.perf_counter()
    args.runs.parent.mkdir(parents=True, exist_ok=True)
    done = {TrialKey(*line["key"]) for line in read_lines(args.runs) if args.any_commit or line["commit"] == commit}
    trials = [key for key in list_trials(args.parts, args.seeds, args.data_sets, args.only) if key not in done]
    for count, key in enumerate(trials):
        if time.perf_counter() - began > args.seconds:
            print(f"{len(trials) - count} trials are left")
            sys.exit(3)
        with scratch_folder() as scratch:
            transcript = run_trial(build_case(key, scratch), partial(is_detected, key))
        line = {"key": list(key), "commit": commit, **asdict(transcript)}
        with args.runs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"{transcript.seconds:6.1f} s  {' '.join(map(str, key))}", flush=True)
    print("all trials are finished")


if __name__ == "__main__":
    main()
