"""The table of docs/architectures.md, from what benchmarks/architectures.py wrote.

    python tools/architectures_table.py [--check]

Writes the table between the marks of the page, or with --check fails where it is another. The last column is from
benchmarks/results/compat.json, which `make compat` writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/architectures.json"
OLDER = RESULTS.with_name("compat.json")
PAGE = ROOT / "docs/architectures.md"
MARKS = ("<!-- table: tools/architectures_table.py -->", "<!-- end of table -->")
EQUAL = {"loss_difference": 1e-5, "gradient_difference": 1e-4, "reload_difference": 1e-5, "merged_difference": 1e-5}


def row(name: str, result: dict[str, Any], older: dict[str, Any] | None) -> str:
    """One model's line."""
    if "refused" in result:
        return f"| {name} | {result['class']} | refused: {result['refused'].removeprefix('model.id: ')} | | | | | | | |"
    left = "; ".join(f"{', '.join(o['names'])} ({o['why']})" for o in result["left_out"])
    numbers = [verdict(result[key], most) for key, most in EQUAL.items()]
    packed = "packed" if result["packs"] else "padded"
    resumed = {True: "same bits", False: "**differs**", None: "not tried"}[result.get("resumed_equal")]
    cells = [name, result["class"], ", ".join(result["adapted"]), left, packed, " / ".join(numbers[:2]), resumed]
    return f"| {' | '.join([*cells, *numbers[2:], describe_older(older)])} |"


def describe_older(read: dict[str, Any] | None) -> str:
    """What the older transformers makes of the merged folder."""
    if read is None:
        return "not tried"
    if read["status"] == "equal":
        return f"{read['difference']:.0e}"
    why = {"base not read": "does not know the kind", "base differs": "computes the base otherwise"}
    return why.get(read["status"], f"**{read['status']}**")


def verdict(difference: float, most: float) -> str:
    """A relative difference, and in bold where it is more than rounding."""
    return f"{difference:.0e}" if difference <= most else f"**{difference:.1e}**"


def table() -> str:
    """All of them."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    older = json.loads(OLDER.read_text(encoding="utf-8"))
    heads = ["model", "class", "adapted", "left out, and why", "batches", "loss / gradient", "resumed", "reloaded"]
    heads += ["merged", f"merged, transformers {older['transformers']}"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(row(name, results[name], older["merged"].get(name)) for name in sorted(results))])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    wanted = f"{before}{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}{after}"
    if "--check" in sys.argv and wanted != text:
        sys.exit("docs/architectures.md is not what the results say: run python tools/architectures_table.py")
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
