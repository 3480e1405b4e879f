"""Knob, rank, learning rate and test runs on one run of 51 M parameters that forgets: results and their cost.

    python benchmarks/knob_50m.py FOLDER [--shared ../shared] [--output benchmarks/results/knob_50m.json] [--only NAME]
    python benchmarks/knob_50m.py FOLDER --picture docs/lens/knob-50m.svg   # of what was measured

The model is the widened one of `widened_model.py`, written to FOLDER/wide. A LoRA of its query and value projections
learns 72 of the 136 shortest rows of an Alpaca file, five times over, so that it forgets stories; the other 64 are its
validation rows. Each command is typed once, as a process of its own, with FOLDER as its working directory. Kept for
each: the command, its seconds and the CPU seconds of all its threads, how many training steps it took, and what it
found. What it printed is in FOLDER/NAME.txt; the pictures are in its reports.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from knob_commands import join_pictures, newest_page, read_result, type_command, write_rows
from machine import described
from widened_model import write_widened

SHORTEST, TRAINED = 136, 72  # rows: those that are taken, and those of them that are trained on
DATA = "model.id=wide data.train=rows.jsonl data.validation=held_out.jsonl data.template=plain"
RUN = f"{DATA} peft.target_modules=[q_proj,v_proj] training.epochs=5"
STEPS = 12  # of each test run: a quarter of the run's 45 steps
COMMANDS = {
    "train": f"train {RUN} output.experiment_name=wide",
    "knob": "knob wide --general stories.jsonl",
    "rank": "rank wide",
    "lr": f"lr {RUN} --steps 12 --rates 0.001,0.003,0.01,0.03 --seeds 1",
    "test": f"analyze --test rate,rank,targets,epoch --test-steps {STEPS}",
}


def choose_rows(source: Path, folder: Path) -> None:
    """The shortest rows, as rows.jsonl to train on and held_out.jsonl."""
    rows = sorted(json.loads(source.read_text(encoding="utf-8")), key=lambda row: sum(map(len, row.values())))
    chosen = random.Random(0).sample(rows[:SHORTEST], SHORTEST)
    write_rows(folder / "rows.jsonl", chosen[:TRAINED])
    write_rows(folder / "held_out.jsonl", chosen[TRAINED:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/knob_50m.json"))
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), help="the others' results stay in the file")
    parser.add_argument("--picture", type=Path, help="draw what was measured to this file, and measure nothing")
    args = parser.parse_args()
    if args.picture:
        join_pictures(newest_page(args.folder, "knob"), args.picture, 2)
        return
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results["machine"] = described()
    if not (args.folder / "wide").is_dir():
        made = write_widened(args.folder / "wide", args.shared / "models/tinystories-656k")
        (args.folder / "model.json").write_text(json.dumps(made))
        shutil.move(args.folder / "wide/stories.jsonl", args.folder)
        choose_rows(args.shared / "data/llama_factory/alpaca_en_demo.json", args.folder)
    results["model"] = json.loads((args.folder / "model.json").read_text())
    for name in args.only or COMMANDS:
        results[name] = {**type_command(name, COMMANDS[name], args.folder), **read_result(name, args.folder, "wide")}
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: results[name]}), file=sys.stderr)


if __name__ == "__main__":
    main()
