"""Kills, full disks and damaged files for every command: the tables of docs/reliability.md.

python tests/faults/run.py [--kills 500] [--starved 80] [--seed 1]

"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES  # type: ignore[import-not-found]
from harness import Bench, Outcome, Tally, damage_all, kill_often, starve_often  # type: ignore[import-not-found]

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks/results/faults.json", ROOT / "docs/reliability.md"
MARKS = ("<!-- table: tests/faults/run.py -->", "<!-- end of table -->")
# A command that takes long is killed less often: the share of the kills that each gets.
SHARES = {"train": 3, "resume": 3, "prepare": 5, "infer": 3, "evaluate": 1, "compare": 1, "export": 5, "merge": 1,
          "tag": 5, "sweep": 1}  # fmt: skip


def main() -> int:
    options = parse_arguments()
    results: dict[str, Any] = {"seed": options.seed, "kills": {}, "full disks": {}, "damaged files": {}}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="training-lens-faults-") as place:
        bench = Bench(Path(place))
        for name in CASES:
            each = round(options.kills * SHARES[name] / sum(SHARES.values()))
            add(results, "kills", kill_often(bench, [name], each, random.Random(f"{options.seed}{name}")))
            starved = round(options.starved * SHARES[name] / sum(SHARES.values()))
            add(results, "full disks", starve_often(bench, [name], starved))
        kinds = ("flip", "cut", "delete")
        for state in ("finished", "interrupted"):
            add(results, "damaged files", damage_all(bench, [state], kinds, random.Random(options.seed)))
        bench.server.close()
    results["minutes"] = round((time.perf_counter() - began) / 60, 1)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + "\n" + table(results) + MARKS[1] + rest.split(MARKS[1])[1])
    return int(any(results["bad"]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--starved", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def add(results: dict[str, Any], what: str, tally: Tally) -> None:
    """Add findings to the results, and print those that break the rule."""
    for case, counts in tally.counts().items():
        results[what][case] = dict(Counter(results[what].get(case, {})) + counts)
    bad = [vars(finding) for finding in tally.bad]
    results.setdefault("bad", []).extend(bad)
    print(what, {case: dict(counts) for case, counts in tally.counts().items()}, *bad, sep="\n  ", flush=True)


def table(results: dict[str, Any]) -> str:
    """All counts as Markdown."""
    outcomes = get_args(Outcome)
    lines = [f"| fault | command | {' | '.join(outcomes)} |", f"|---|---|{'---:|' * len(outcomes)}"]
    for what in ("kills", "full disks", "damaged files"):
        total: Counter[str] = Counter()
        for case, counts in results[what].items():
            total += Counter(counts)
            lines.append(f"| {what} | {case} | {' | '.join(str(counts.get(outcome, 0)) for outcome in outcomes)} |")
        cells = " | ".join(f"**{total.get(outcome, 0)}**" for outcome in outcomes)
        lines.append(f"| **{what}** | **all {total.total()}** | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
