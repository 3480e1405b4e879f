"""How the cost of our training grows: along one axis at a time, all else as in train_speed.py; a short run a point."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from machine import matmul_flops
from training_jobs import Job, long_pairs, run_job, write_model, write_pairs

STEPS = 3  # of which the first is left out


@dataclass(frozen=True)
class Point:
    """One run: tokens of each row, shape of the model, rank, rows of a step."""

    length: int = 256
    model: str = "125m"
    rank: int = 16
    batch: int = 8


AXES: dict[str, list[Point]] = {
    "length": [Point(length=n, batch=max(1, 4096 // n)) for n in (128, 256, 512, 1024, 2048, 4096)],
    "model": [Point(model=name) for name in ("1m", "8m", "25m", "60m", "125m", "350m")],
    "rank": [Point(rank=n) for n in (4, 16, 64, 192)],  # of 192 is the narrowest projection
    "batch": [Point(batch=n) for n in (1, 2, 4, 8, 16, 32)],
}


def grow(axes: Sequence[str], tokenizer: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Tokens per second and peak memory at each point of these axes; along `length` a step has 4,096 tokens."""
    points = dict.fromkeys(point for axis in axes for point in AXES[axis])  # one that is on several axes is run once
    found = {point: _measured(point, tokenizer, folder) for point in points}
    return {axis: [found[point] for point in AXES[axis]] for axis in axes}


def _measured(point: Point, tokenizer: Path, folder: Path) -> dict[str, Any]:
    name = "-".join(str(value) for value in vars(point).values())
    place, model = folder / name, folder / point.model
    place.mkdir(exist_ok=True)
    parameters = write_model(model, point.model, tokenizer)
    write_pairs(long_pairs(point.length, STEPS * point.batch), place / "rows.jsonl")
    job = Job("ours", str(model), str(place / "rows.jsonl"), "", str(place / "outputs"))
    job = replace(job, batch=point.batch, rank=point.rank, alpha=2 * point.rank, seq_len=point.length)
    result, flops = run_job(job, place), matmul_flops()
    measured = {**vars(point), "parameters": parameters, **_rates(result, point, parameters, flops)}
    print(json.dumps(measured), file=sys.stderr)
    return measured


def _rates(result: dict[str, Any], point: Point, parameters: int, flops: float) -> dict[str, Any]:
    if "failed" in result:
        return result
    rate = point.length * point.batch / statistics.median(result["step_seconds"][1:])
    return {
        "tokens_per_second": round(rate, 1),
        "share_of_matmul_rate": round(4 * parameters * rate / flops, 4),
        "peak_bytes": result["peak_bytes"],
    }
