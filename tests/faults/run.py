"""Faults for every command, and what became of them: the tables of docs/reliability.md.

python tests/faults/run.py [KIND ...] [--only COMMAND ...] [--share 1.0] [--seed 1]

Kinds are kills, signals, disks, damage, machine, services; without one, all. `--only` these commands are killed: their
counts take the place of earlier ones. `--share` of the usual number of tries.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from bench import Bench, Outcome, Tally  # type: ignore[import-not-found]
from cases import CASES  # type: ignore[import-not-found]
from kinds import (  # type: ignore[import-not-found]
    READERS,
    break_machine,
    can_mount,
    damage_all,
    fill_often,
    flip_cache,
    kill_often,
    signal_at_start,
    signal_often,
)
from services import Services, lose_services  # type: ignore[import-not-found]

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks/results/faults.json", ROOT / "docs/reliability.md"
MARKS = ("<!-- table: tests/faults/run.py -->", "<!-- end of table -->")
# How often each command is killed: what takes long less often.
KILLS = {
    "train": 36, "resume": 30, "train a step": 20, "train from a prepared folder": 8, "validate": 16, "prepare": 110,
    "infer": 60, "evaluate": 14, "compare": 10, "baseline": 12, "benchmark": 8, "analyze": 8, "report": 20,
    "export": 72, "merge": 6, "sync": 6, "doctor": 6, "tag": 52, "show": 6, "delete": 52, "sweep": 6,
}  # fmt: skip
WAYS = ("flip", "cut", "delete")
SLOW = ("merge", "sweep", "sweep, resumed", "benchmark", "train from a prepared folder")  # not on each broken machine


def kills(bench: Bench, share: float, draw: random.Random, only: Sequence[str] = ()) -> Iterator[Tally]:
    for name in only or KILLS:
        yield kill_often(bench, name, round(KILLS[name] * share), draw)


def signals(bench: Bench, share: float, draw: random.Random) -> Iterator[Tally]:
    yield signal_at_start(bench, round(18 * share), draw)
    for name in ("train", "resume", "evaluate", "prepare", "infer", "sweep"):
        yield signal_often(bench, name, round((24 if name == "train" else 6) * share), draw)


def disks(bench: Bench, share: float, draw: random.Random) -> Iterator[Tally]:
    for name in CASES:
        yield fill_often(bench, name, round(max(KILLS.get(name, 0) / 4, 4) * share), draw)


def damage(bench: Bench, share: float, draw: random.Random) -> Iterator[Tally]:
    yield flip_cache(bench, round(200 * share), draw)
    for state in READERS:
        most = round(len(bench.files(state)) * share) if share < 1 else 24 if state == "swept" else 0  # two runs in it
        yield damage_all(bench, state, WAYS, draw, most)


def machine(bench: Bench, share: float, draw: random.Random) -> Iterator[Tally]:
    names = [name for name in CASES if name not in SLOW]
    for name in draw.sample(names, round(len(names) * min(share, 1.0))):
        yield break_machine(bench, name, draw)


def services(bench: Bench, share: float, draw: random.Random, both: Services) -> Iterator[Tally]:
    yield lose_services(bench, both, round(8 * share), draw)


KINDS: dict[str, Callable[..., Iterator[Tally]]] = {
    "kills": kills, "signals": signals, "disks": disks, "damage": damage, "machine": machine, "services": services,
}  # fmt: skip
TITLES = {
    "kills": "kill", "signals": "TERM, INT, HUP", "disks": "full disk", "damage": "damaged file",
    "machine": "broken machine", "services": "hub and S3 away",
}  # fmt: skip


def main() -> int:
    options = parse_arguments()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="training-lens-faults-") as place:
        both = Services(Path(place))
        bench = Bench(Path(place), both.environment)
        for kind in options.kinds or TITLES:
            draw, began = random.Random(f"{options.seed} {kind}"), time.perf_counter()
            more = {"services": (both,), "kills": (options.only,)}.get(kind, ())
            each = KINDS[kind](bench, options.share, draw, *more)
            counts: dict[str, Counter[str]] = {}
            for tally in each:
                bad += len(tally.bad)
                show(kind, tally)
                for case, found in tally.counts().items():
                    counts[case] = counts.get(case, Counter()) + found
            minutes = round((time.perf_counter() - began) / 60, 1)
            about = {"seed": options.seed, "share": options.share, "minutes": minutes, "mounts": can_mount()}
            keep(kind, {**about, "counts": counts})
        bench.server.close()
    return int(bad > 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", choices=[*TITLES, []])
    parser.add_argument("--only", nargs="+", default=[], choices=KILLS)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def show(kind: str, tally: Tally) -> None:
    """Print counts, and all findings that break the rule."""
    print(kind, {case: dict(counts) for case, counts in tally.counts().items()}, flush=True)
    for finding in tally.bad:
        print(f"  {finding.case}, {finding.fault}: {finding.outcome}\n{finding.text}", flush=True)


def keep(kind: str, found: dict[str, Any]) -> None:
    """Put the counts of one kind into the results, and all of them into the page; two processes take turns."""
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        found["counts"] = {**results.get(kind, {}).get("counts", {}), **found["counts"]}
        results[kind] = found
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(before + MARKS[0] + "\n\n" + table(results) + "\n" + MARKS[1] + rest.split(MARKS[1])[1])
    RESULTS.with_suffix(".lock").unlink(missing_ok=True)


def table(results: dict[str, Any]) -> str:
    """All counts as Markdown."""
    outcomes = get_args(Outcome)
    lines = [f"| fault | command | {' | '.join(outcomes)} |", f"|---|---|{'---:|' * len(outcomes)}"]
    for kind in (name for name in TITLES if name in results):
        total: Counter[str] = Counter()
        for case, counts in results[kind]["counts"].items():
            total += Counter(counts)
            lines.append(
                f"| {TITLES[kind]} | {case} | {' | '.join(str(counts.get(outcome, 0)) for outcome in outcomes)} |"
            )
        cells = " | ".join(f"**{total.get(outcome, 0)}**" for outcome in outcomes)
        lines.append(f"| **{TITLES[kind]}** | **all {total.total()}** | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
