"""Canaries planted once, 4 and 16 times an epoch: are their exposures in this order, and the unplanted at chance?

    python benchmarks/explain/canaries.py [--rows 240] [--epochs 2] [--canaries 4] [--candidates 256] [--output FILE]

Rows of the embedded set with `data.canaries` planted among them, trained as they come. Written are the exposure of
every canary among the candidates, the mean of each group, and the chance level.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import described

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.analysis.explanations.memory_measurement import MemoryOptions, explain_memory
from training_lens.analysis.explanations.memory_report import describe_memory
from training_lens.runs.run_folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--canaries", type=int, default=4)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/explain_canaries.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        values: dict[str, Any] = {
            "data": {"canaries": options.canaries, "max_examples": options.rows},
            "training": {"epochs": options.epochs, "seed": options.seed},
            "lens": {"enabled": False},
            "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None},
            "output": {"base_output_dir": temporary},
        }
        summary = TrainingWrapper(TrainingConfig.model_validate(values)).train()
        found = explain_memory(RunFolder(Path(summary.run_dir)), MemoryOptions(candidates=options.candidates))
    groups = found.list_repeats()
    result = {
        "machine": described(),
        "rows": options.rows,
        "epochs": options.epochs,
        "seed": options.seed,
        "candidates": found.candidates,
        "chance": round(found.chance, 4),
        "mean_exposure": {str(repeats): round(float(np.mean(values)), 3) for repeats, values in groups.items()},
        "exposures": {str(repeats): [round(v, 3) for v in sorted(values)] for repeats, values in groups.items()},
        "says": list(describe_memory(found)),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
