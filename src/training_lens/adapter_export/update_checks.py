"""Whether written factors are the trained updates: s B A of both, compared in float64, number by number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from training_lens.merging.verification import MergeCheck
from training_lens.merging.weight_update import ROUNDOFF, LowRankUpdate, Update

BLOCK = 2**22  # numbers of an update at a time: 32 MB in float64
SLACK = 1 + 1e-6  # of the bound, for the comparison's own rounding in float64
Updates = Mapping[str, Update]


def check_updates(trained: Updates, scale: float, written: Updates) -> tuple[MergeCheck, MergeCheck]:
    """Compare every written update with `scale` times the trained one, by the names of the base's weights.

    The first check is the largest |s' B' A' - scale s B A| / e, where e = 2^-24 |scale s| |B| |A| is what rounding B'
    once to float32 may change. The second counts updates that only one side has. Memory: blocks of one update.
    """
    lost = sorted(trained.keys() ^ written.keys())
    errors = {name: _largest_error(trained[name], scale, written[name]) for name in trained.keys() & written.keys()}
    worst = max(errors, key=errors.__getitem__, default="")
    return (
        MergeCheck("written updates: largest error, in roundings", errors.get(worst, math.inf), 1.0, worst),
        MergeCheck("updates that are missing or not the adapter's", float(len(lost)), 0.0, ", ".join(lost[:3])),
    )


def _largest_error(trained: Update, scale: float, written: Update) -> float:
    """The largest error of one update over the allowed one; infinite where they are not both low-rank, of one shape."""
    if not isinstance(trained, LowRankUpdate) or not isinstance(written, LowRankUpdate):
        return math.inf
    shapes = [(len(update.b), update.a.shape[1], update.magnitude is None) for update in (trained, written)]
    if shapes[0] != shapes[1] or trained.magnitude is not None:
        return math.inf
    largest, length = 0.0, max(1, BLOCK // trained.a.shape[1])
    a, a_written = trained.a.double(), written.a.double()
    for start in range(0, len(trained.b), length):
        rows = slice(start, start + length)
        b = scale * trained.factor * trained.b[rows].double()
        error = (written.factor * (written.b[rows].double() @ a_written) - b @ a).abs()
        allowed = SLACK * ROUNDOFF * (b.abs() @ a.abs()) + torch.finfo(torch.float32).smallest_normal
        largest = max(largest, (error / allowed).nan_to_num(nan=math.inf).max().item())
    return largest


def check_copies(source: Path, folder: Path, names: tuple[str, ...]) -> MergeCheck:
    """Count files that are not copied byte for byte."""
    different = [name for name in names if (source / name).read_bytes() != (folder / name).read_bytes()]
    return MergeCheck("files that differ from the adapter's", float(len(different)), 0.0, ", ".join(different))
