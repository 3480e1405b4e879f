"""The tables of docs/lens/findings.md on the planted suite, from what benchmarks/planted/summarize_planted.py wrote.

python tools/planted_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/planted.json"
EARLIER = RESULTS.with_name("planted_before.json")
PAGE = ROOT / "docs/lens/findings.md"
MARKS = ("<!-- table: tools/planted_table.py -->", "<!-- end of table -->")
OUTCOMES = ("before", "during", "after", "inconclusive", "false fine", "missed")


def read_results(path: Path) -> dict[str, Any]:
    """A summary of the suite."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def lay_out(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def show_count(count: int) -> str:
    """A count; nothing for 0."""
    return str(count) if count else ""


def goals_table(now: dict[str, Any], before: dict[str, Any]) -> str:
    """The goals, as they are reached, and the first measurement."""
    heads = ["", "trials", "handled", "false “fine”", "controls", "with a false alarm", "most of one finding"]
    return lay_out(heads, [_goal_row("now", now["goals"]), _goal_row("before", before["goals"])])


def _goal_row(name: str, goals: dict[str, Any]) -> list[str]:
    return [
        *(name, f"{goals['trials']} of {goals['kinds']} kinds", f"{goals['handled']:.1%}", str(goals["false fine"])),
        *(str(goals["controls"]), str(goals["controls with a false alarm"])),
        f"{goals['most false alarms of a finding']:.1%}",
    ]


def kinds_table(results: dict[str, Any]) -> str:
    """A line for each kind: the right findings, and what became of its trials."""
    heads = ["planted", "right findings", *OUTCOMES]
    rows = []
    for kind in results["kinds"].values():
        if counts := kind["reported"]:
            codes = ", ".join(f"`{code}`" for code in dict.fromkeys(kind["answers"]))
            rows.append([kind["what"], codes, *(show_count(counts[outcome]) for outcome in OUTCOMES)])
    return lay_out(heads, rows)


def findings_table(results: dict[str, Any]) -> str:
    """A line for each finding: the trials of its kinds, and its false alarms on the controls."""
    heads = ["finding", "trials", *OUTCOMES, f"false alarms in {results['goals']['controls']} controls"]
    return lay_out(
        heads,
        [
            [f"`{code}`", show_count(of["trials"]), *(show_count(of[o]) for o in OUTCOMES), str(of["false alarms"])]
            for code, of in results["findings"].items()
        ],
    )


def reference(page: str) -> str:
    """The page with the tables between its marks."""
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    now, earlier = read_results(RESULTS), read_results(EARLIER)
    tables = "\n\n".join([goals_table(now, earlier), findings_table(now), kinds_table(now)])
    return f"{before}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(reference(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
