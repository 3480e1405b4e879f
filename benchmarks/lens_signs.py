"""What the lens's signs of a learning rate are at rates from far too low to far too high.

    python benchmarks/lens_signs.py [--output benchmarks/results/lens_signs.json]

The packaged model on its instruction set: 120 steps of eight rows, rank 8, cosine schedule, clipping at 1, one seed.
Written for each rate: the validation loss; ||dW|| / ||W|| and the straightness of dW's path (||dW|| over the sum of
its steps' norms) at the end, medians over modules; the share of steps that were clipped; and which of the two findings
on the rate spoke up, as a run's report says it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from training_lens import CheckpointAnalyzer, TrainingConfig, TrainingWrapper

RATES = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 3e-1)
STEPS = 120


def signs(rate: float, folder: str) -> dict[str, Any]:
    """One run at a rate, and what its captures say."""
    config = TrainingConfig.model_validate(
        {
            "data": {"max_examples": 8 * STEPS},
            "training": {"lr": rate, "epochs": 1, "batch_size": 8, "max_grad_norm": 1.0, "eval_steps": 20},
            "peft": {"r": 8},
            "lens": {"report": False},
            "output": {"base_output_dir": folder},
        }
    )
    summary = TrainingWrapper(config).train()
    analyzer = CheckpointAnalyzer(summary.run_dir)
    recording = analyzer.recording
    steps, update = (recording.series("adapter_weights", name).values for name in ("norm_step", "norm_update"))
    clips = recording.series("loss", "clip").column("run")
    return {
        "rate": rate,
        "steps": summary.steps,
        "validation_loss": summary.validation_loss,
        "strength": float(np.median(analyzer.evolution("strength").values[-1])),
        "straightness": float(np.median(update[-1] / steps.sum(0))),
        "clipped_share": float((clips < 1).mean()),
        "findings": {
            f.code: f"{f.severity}, {f.confidence}: {f.title}"
            for f in analyzer.analyze().findings
            if f.code.startswith("rate_")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lens_signs.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [signs(rate, folder) for rate in RATES]
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
