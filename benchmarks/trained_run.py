"""One trained run, merged in every number type and timed: the numbers of docs/merge.md and docs/inference.md.

    python benchmarks/trained_run.py [--output benchmarks/results/trained_run.json]

Trains the embedded default, and a short run on its base in 8 bits, in a temporary folder. Writes one JSON object: of
each merge the largest logit difference, the logits' spread and how many roundings the weights are off; and what
`benchmark --json` gives.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from running import command


def merged(run: str, folder: str, dtype: str) -> dict[str, Any]:
    """What a merge measured; a share of the spread is what the limits are in."""
    report = command("merge", "--run", run, "--dtype", dtype, "--output", f"{folder}/{dtype}")
    spread = max(1.0, report["logit_spread"])
    kept = {key: report[key] for key in ("max_logit_difference", "logit_spread", "mean_kl", "greedy_agreement", "ties")}
    return {**kept, "share_of_spread": report["max_logit_difference"] / spread, "checks": report["checks"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/trained_run.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = f"output.base_output_dir={folder}/outputs"
        run = command("train", "+experiment=default", place)["run_dir"]
        results: dict[str, Any] = {"benchmark": command("benchmark", "--run", run)}
        results["merge"] = {dtype: merged(run, folder, dtype) for dtype in ("fp32", "fp16", "bf16")}
        short = ["+experiment=quick_test", "model.quantization=8bit", "output.experiment_name=8bit"]
        run = command("train", *short, place)["run_dir"]
        results["merge"]["8bit"] = merged(run, f"{folder}/8bit", "fp32")
        text = json.dumps(results, indent=2).replace(folder, ".")
    args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
