"""Does the training loss step down where an epoch ends?

    python benchmarks/published/staircase.py [--shared ../shared] [--output benchmarks/results/published_staircase.json]

Claimed: where rows are repeated the training loss falls like a staircase, at once at each epoch's end, since the model
remembers rows that it has seen (Howard and Whitaker 2023, "Can LLMs learn from a single example?", fast.ai); one epoch
of as many different rows has no such steps.

Measured: 3 epochs of N rows against one epoch of 3 N, the same steps, batches, rates and seeds, on two models. At both
ends of an epoch of N rows, a line is fitted to the losses of one epoch on each side; the drop is by how much they miss
each other there (a regression discontinuity), with its standard error from the fit. A seed decides the rows, their
order and the adapter's start. Drops are averaged over seeds, whose scatter gives the standard error that counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from runs import SHORT_TOKENS, Setting, parsed, settings, trained, write_results

from training_lens.measures.curves import epoch_drops

EPOCHS, STEPS_PER_EPOCH, BATCH = 3, 40, 4
ROWS = STEPS_PER_EPOCH * BATCH
PEFT = {"r": 64, "lora_alpha": 64.0}
LR = 5e-3
KINDS = {"repeated": (ROWS, EPOCHS), "once": (ROWS * EPOCHS, 1)}  # rows, epochs


def losses_of(setting: Setting, folder: str, kind: str, seed: int) -> list[float]:
    """The training loss of each step."""
    rows, epochs = KINDS[kind]
    config = setting.short_rows(
        folder,
        data={"max_examples": rows},
        peft=PEFT,
        training={"lr": LR, "epochs": epochs, "seed": seed, "batch_size": BATCH},
    )
    return trained(config).losses


def drops_of(losses: list[float]) -> list[dict[str, float]]:
    """The drop at the end of each epoch of N rows but the last, with its standard error from the two lines."""
    steps = np.arange(1, len(losses) + 1)
    found = epoch_drops(steps, np.array(losses), STEPS_PER_EPOCH, STEPS_PER_EPOCH)
    return [{"after_step": d.step, "drop": d.drop, "error_of_fit": d.error} for d in found]


def measured(setting: Setting, folder: str, kind: str, seeds: int) -> dict[str, Any]:
    """The drops of all seeds, their mean at each boundary and over both, with errors from the seeds."""
    curves = [losses_of(setting, folder, kind, seed) for seed in range(seeds)]
    drops = [drops_of(curve) for curve in curves]
    table = np.array([[d["drop"] for d in of_seed] for of_seed in drops])  # (seeds, boundaries)
    return {
        "mean_drop": mean_with_error(table.mean(1)),
        "by_boundary": [
            {"after_step": d["after_step"], **mean_with_error(column)}
            for d, column in zip(drops[0], table.T, strict=True)
        ],
        "by_seed": drops,
        "mean_curve": list(map(float, np.mean(curves, axis=0))),
    }


def mean_with_error(values: np.ndarray) -> dict[str, float]:
    """The mean over seeds and its standard error."""
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / np.sqrt(len(values)))}


def compared(setting: Setting, folder: str, seeds: int) -> dict[str, Any]:
    """Both kinds, and the difference of their drops seed by seed."""
    kinds = {kind: measured(setting, folder, kind, seeds) for kind in KINDS}
    repeated, once = (
        np.array([[d["drop"] for d in of_seed] for of_seed in kinds[kind]["by_seed"]]).mean(1) for kind in KINDS
    )
    return {**kinds, "difference": mean_with_error(repeated - once)}


def models(of: Sequence[Setting], seeds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for setting in of:
        with tempfile.TemporaryDirectory() as folder:
            yield setting.name, compared(setting, folder, seeds)


def main() -> None:
    args = parsed(__doc__, "published_staircase.json")
    started, seeds = time.perf_counter(), 2 if args.quick else 5
    given = {
        "rows": ROWS,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "longest_row_tokens": SHORT_TOKENS,
        "lr": LR,
        **PEFT,
        "seeds": seeds,
    }
    far = [s for s in settings(args.shared) if "GSM8K" in s.name]  # rows alike in length and kind: less noise
    results = {"settings": given, "models": dict(models(far, seeds))}
    write_results(args.output, results, time.perf_counter() - started)


if __name__ == "__main__":
    main()
