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
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import described
from widened_model import write_widened

from training_lens.analysis.knob_report import build_knob_report
from training_lens.analysis.scale_sweep import Knob, KnobPoint
from training_lens.display.html import SvgPicture
from training_lens.display.svg import WIDTH
from training_lens.utils.integrity import read_sealed

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
COLUMNS = "160"  # of the terminal
GAP = 24  # pixels between two pictures


def write_rows(source: Path, folder: Path) -> None:
    """The shortest rows, as rows.jsonl to train on and held_out.jsonl."""
    rows = sorted(json.loads(source.read_text(encoding="utf-8")), key=lambda row: sum(map(len, row.values())))
    chosen = random.Random(0).sample(rows[:SHORTEST], SHORTEST)
    for name, part in {"rows": chosen[:TRAINED], "held_out": chosen[TRAINED:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def type_command(name: str, folder: Path) -> dict[str, Any]:
    """Run one command in the folder; its cost."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    call = [sys.executable, "-m", "training_lens", *COMMANDS[name].split()]
    environment = {**os.environ, "COLUMNS": COLUMNS}
    found = subprocess.run(call, cwd=folder, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    (folder / f"{name}.txt").write_text(f"$ training-lens {COMMANDS[name]}\n{found.stdout}", encoding="utf-8")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command": f"training-lens {COMMANDS[name]}", "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def read_newest(folder: Path, pattern: str) -> dict[str, Any]:
    """The newest JSON file of the pattern."""
    path = max(folder.glob(f"outputs/experiments/{pattern}"), key=lambda path: path.stat().st_mtime)
    return dict(read_sealed(path))


def pick(values: dict[str, Any], names: str) -> dict[str, Any]:
    """The named values, numbers to four digits."""
    return {name: round_numbers(values[name]) for name in names.split()}


def round_numbers(value: Any) -> Any:
    """Numbers to four digits, in lists and objects, too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: round_numbers(each) for name, each in value.items()}
    return [round_numbers(each) for each in value] if isinstance(value, list) else value


def read_training(folder: Path) -> dict[str, Any]:
    found = read_newest(folder, "wide/runs/*/metadata/summary.json")
    return {**pick(found, "steps tokens"), "step_seconds": round_numbers(found["seconds"])}


def read_knob(folder: Path) -> dict[str, Any]:
    found = read_newest(folder, "wide/runs/*/reports/knob.json")
    names = "name loss gain_kept gain_kept_interval kl general_change general_change_interval"
    points = [pick(point, names) for point in found["points"]]
    kept = "rows general_rows base_loss base_general_loss offered optimum optimum_interval passes tokens"
    return {**pick(found, kept), "points": points}


def read_rank(folder: Path) -> dict[str, Any]:
    found = read_newest(folder, "wide/runs/*/lens/rank_check.json")
    cut = [found["at_energy_ranks"], *found["at_larger_shares"], *found["at_fixed_ranks"]]
    points = [pick(point, "rank share loss delta low high parameters") for point in cut]
    return {**pick(found, "rows base_loss loss parameters rank_pattern"), "points": points}


def read_rates(folder: Path) -> dict[str, Any]:
    found = read_newest(folder, "*/rates/*/lr.json")
    return round_numbers({name: value for name, value in found.items() if name != "curves"})


def read_tests(folder: Path) -> dict[str, Any]:
    found = read_newest(folder, "wide/runs/*/lens/interventions.json")
    return {name: round_numbers(answer) for name, answer in found.items() if isinstance(answer, dict)}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "train": read_training, "knob": read_knob, "rank": read_rank, "lr": read_rates, "test": read_tests,
}  # fmt: skip


def write_picture(folder: Path, path: Path) -> None:
    """The knob's first two pictures, one above the other."""
    values = read_newest(folder, "wide/runs/*/reports/knob.json")
    knob = Knob(**{**values, "points": tuple(KnobPoint(**point) for point in values["points"])})
    drawn = [part.svg for part in build_knob_report(knob).parts if isinstance(part, SvgPicture)][:2]
    heights = [int(re.search(r'viewBox="0 0 \d+ (\d+)"', svg)[1]) for svg in drawn]
    tops = [sum(heights[:i]) + GAP * i for i in range(len(drawn))]
    placed = [
        re.sub(
            r"^<svg [^>]*?width=\S+ style=[^>]*? xmlns", f'<svg y="{top}" width="{WIDTH}" height="{height}" xmlns', svg
        )
        for svg, top, height in zip(drawn, tops, heights, strict=True)
    ]
    whole = f'<svg viewBox="0 0 {WIDTH} {tops[-1] + heights[-1]}" width="{WIDTH}" xmlns="http://www.w3.org/2000/svg">'
    path.write_text(f"{whole}{''.join(placed)}</svg>\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/knob_50m.json"))
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), help="the others' results stay in the file")
    parser.add_argument("--picture", type=Path, help="draw what was measured to this file, and measure nothing")
    args = parser.parse_args()
    if args.picture:
        write_picture(args.folder, args.picture)
        return
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results["machine"] = described()
    if not (args.folder / "wide").is_dir():
        made = write_widened(args.folder / "wide", args.shared / "models/tinystories-656k")
        (args.folder / "model.json").write_text(json.dumps(made))
        shutil.move(args.folder / "wide/stories.jsonl", args.folder)
        write_rows(args.shared / "data/llama_factory/alpaca_en_demo.json", args.folder)
    results["model"] = json.loads((args.folder / "model.json").read_text())
    for name in args.only or COMMANDS:
        results[name] = {**type_command(name, args.folder), **READERS[name](args.folder)}
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: results[name]}), file=sys.stderr)


if __name__ == "__main__":
    main()
