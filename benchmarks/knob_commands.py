"""Commands on a trained run as a user types them: what each found, what it cost, and its pictures for the docs."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training_lens.display.svg import WIDTH
from training_lens.utils.integrity import read_sealed

COLUMNS = "160"  # of the terminal
GAP = 24  # pixels between two pictures


def type_command(name: str, line: str, folder: Path) -> dict[str, Any]:
    """Run one command in the folder, with what it prints in NAME.txt there; its cost."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    call = [sys.executable, "-m", "training_lens", *line.split()]
    environment = {**os.environ, "COLUMNS": COLUMNS}
    found = subprocess.run(call, cwd=folder, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    (folder / f"{name}.txt").write_text(f"$ training-lens {line}\n{found.stdout}", encoding="utf-8")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command": f"training-lens {line}", "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_result(command: str, folder: Path, experiment: str) -> dict[str, Any]:
    """The key figures of the newest result of `train`, `knob`, `rank`, `lr` or `analyze --test` of an experiment."""
    runs = f"{experiment}/runs/*"
    if command == "train":
        found = _read_newest(folder, f"{runs}/metadata/summary.json")
        return {
            **_pick(found, "steps tokens validation_loss base_validation_loss"),
            "step_seconds": round_numbers(found["seconds"]),
        }
    if command == "knob":
        return _read_knob(_read_newest(folder, f"{runs}/reports/knob.json"))
    if command == "rank":
        return _read_rank(_read_newest(folder, f"{runs}/lens/rank_check.json"))
    if command == "lr":
        return _summarize_rates(_read_newest(folder, "*/rates/*/lr.json"))
    found = _read_newest(folder, f"{runs}/lens/interventions.json")
    return {name: round_numbers(answer) for name, answer in found.items() if isinstance(answer, dict)}


def _read_newest(folder: Path, pattern: str) -> dict[str, Any]:
    """The newest JSON file of the pattern."""
    path = max(folder.glob(f"outputs/experiments/{pattern}"), key=lambda path: path.stat().st_mtime)
    return dict(read_sealed(path))


def _pick(values: Mapping[str, Any], names: str) -> dict[str, Any]:
    """The named values, numbers to four digits."""
    return {name: round_numbers(values[name]) for name in names.split() if name in values}


def round_numbers(value: Any) -> Any:
    """Numbers to four digits, in lists and objects, too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: round_numbers(each) for name, each in value.items()}
    return [round_numbers(each) for each in value] if isinstance(value, list) else value


def _read_knob(found: Mapping[str, Any]) -> dict[str, Any]:
    names = "name loss gain_kept gain_kept_interval kl general_change general_change_interval"
    points = [_pick(point, names) for point in found["points"]]
    kept = "rows general_rows base_loss base_general_loss offered optimum optimum_interval passes tokens"
    return {**_pick(found, kept), "points": points}


def _read_rank(found: Mapping[str, Any]) -> dict[str, Any]:
    cut = [found["at_energy_ranks"], *found["at_larger_shares"], *found["at_fixed_ranks"]]
    points = [_pick(point, "rank share loss delta low high parameters") for point in cut]
    return {**_pick(found, "rows base_loss loss parameters rank_pattern"), "points": points}


def _summarize_rates(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without the losses of single steps; `all_steps` are those of all runs."""
    runs = [{**_pick(run, "rate seed held_out seconds end"), "steps": len(run["losses"])} for run in found["runs"]]
    rest = {name: value for name, value in found.items() if name not in ("runs", "curves", "seconds")}
    return {**round_numbers(rest), "all_steps": sum(run["steps"] for run in runs), "runs": runs}


def join_pictures(page: Path, path: Path, count: int) -> None:
    """The first pictures of a report's page as one file, one above the other."""
    drawn = re.findall(r"<svg .*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL)[:count]
    heights = [int(re.search(r'viewBox="0 0 \d+ (\d+)"', svg)[1]) for svg in drawn]  # type: ignore[index]
    tops = [sum(heights[:i]) + GAP * i for i in range(len(drawn))]
    placed = [
        re.sub(
            r"^<svg [^>]*?width=\S+ style=[^>]*? xmlns", f'<svg y="{top}" width="{WIDTH}" height="{height}" xmlns', svg
        )
        for svg, top, height in zip(drawn, tops, heights, strict=True)
    ]
    whole = f'<svg viewBox="0 0 {WIDTH} {tops[-1] + heights[-1]}" width="{WIDTH}" xmlns="http://www.w3.org/2000/svg">'
    path.write_text(f"{whole}{''.join(placed)}</svg>\n", encoding="utf-8")


def newest_page(folder: Path, name: str) -> Path:
    """The page of the newest report of this name."""
    return max(folder.glob(f"outputs/experiments/**/{name}.html"), key=lambda path: path.stat().st_mtime)
