"""Knob, rank, learning rate and test runs on two small models: the numbers of docs/lens/knob.md and docs/sweeps.md.

    python benchmarks/knob_rank_lr.py [--shared ../shared] [--output benchmarks/results/knob_rank_lr.json]
    python benchmarks/knob_rank_lr.py --only gsm8k --commands train knob    # the others' results stay in the file
    python benchmarks/knob_rank_lr.py --keep FOLDER --pictures docs         # draw what was measured, for the docs

`demo` is the embedded model on its own rows, `gsm8k` the 656,000 parameters of TinyStories on rows of GSM8K. Each
command is typed once, as a process of its own, in a temporary folder, or in FOLDER/demo and FOLDER/gsm8k with `--keep`.
Kept for each: the command, its seconds and the CPU seconds of all its threads, its steps or passes, and what it found.
What it printed is in NAME.txt there; the pictures are in its reports.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from knob_commands import join_pictures, newest_page, read_result, type_command, write_rows
from machine import described

MODEL = "tinystories-656k"
TRAINED, HELD_OUT = 400, 256  # rows of GSM8K: the first of train.jsonl and of test.jsonl
TOO_LOW = 4e-4  # a tenth of the rate that the model's width gives
COMMANDS = {
    "demo": {
        "train": "train training.max_steps=120 training.eval_steps=40 output.experiment_name=demo",
        "knob": "knob demo",
        "rank": "rank demo --write smaller --keep 95%",
        "lr": "lr",
    },
    "gsm8k": {
        "train": "train {data} training.epochs=5 output.experiment_name=gsm8k",
        "knob": "knob gsm8k",
        "rank": "rank gsm8k",
        "lr": "lr {data} training.epochs=5",
        "test": "analyze gsm8k --test rate,rank,targets,epoch --test-steps 63",
        "train low": "train {data} training.max_steps=40 training.lr={low} output.experiment_name=low",
        "test low": "analyze low --test rate",
    },
}
PICTURES = {  # of the docs: the case, the report, and how many of its pictures
    "lens/knob.svg": ("demo", "knob", 3), "lr.svg": ("demo", "lr", 2), "lens/knob-gsm8k.svg": ("gsm8k", "knob", 3),
    "lr-gsm8k.svg": ("gsm8k", "lr", 2),
}  # fmt: skip


def write_splits(shared: Path, folder: Path) -> None:
    """The first rows of GSM8K's two files."""
    for source, name, count in (("train", "rows", TRAINED), ("test", "held_out", HELD_OUT)):
        lines = (shared / f"data/gsm8k/{source}.jsonl").read_text(encoding="utf-8").splitlines()
        write_rows(folder / f"{name}.jsonl", [json.loads(line) for line in lines[:count]])


def make_folder(case: str, folder: Path, shared: Path) -> Path:
    """Where a case's commands are typed, with its rows and its model."""
    folder.mkdir(parents=True, exist_ok=True)
    if case == "gsm8k" and not (folder / MODEL).exists():
        write_splits(shared, folder)
        (folder / MODEL).symlink_to((shared / "models" / MODEL).resolve())
    return folder


def measure_command(case: str, name: str, folder: Path) -> dict[str, Any]:
    """Type a command of a case; its cost, and what it found."""
    data = f"model.id={MODEL} data.train=rows.jsonl data.validation=held_out.jsonl"
    line = COMMANDS[case][name].format(data=data, low=TOO_LOW)
    kind, _, other = name.partition(" ")
    cost = type_command(name.replace(" ", "_"), line, folder)
    return {**cost, **read_result(kind, folder, other or case)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/knob_rank_lr.json"))
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--commands", nargs="*", help="of the case, in this order; the others' results stay")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="run there, and leave everything")
    parser.add_argument("--pictures", type=Path, metavar="DOCS", help="draw what is in --keep, and measure nothing")
    args = parser.parse_args()
    if args.pictures:
        for name, (case, report, count) in PICTURES.items():
            join_pictures(newest_page(args.keep / case, report), args.pictures / name, count)
        return
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results["machine"] = described()
    with tempfile.TemporaryDirectory() as temporary:
        for case in args.only:
            folder = make_folder(case, (args.keep or Path(temporary)) / case, args.shared)
            for name in args.commands or COMMANDS[case]:
                results.setdefault(case, {})[name] = found = measure_command(case, name, folder)
                args.output.write_text(json.dumps(results, indent=1) + "\n")
                print(json.dumps({case: {name: found}}), file=sys.stderr)


if __name__ == "__main__":
    main()
