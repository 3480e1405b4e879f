"""Real runs through the command: the embedded default and a real model on real files, as docs/results.md shows them.

    python benchmarks/real_files.py [--shared ../shared]

Runs each command with `--json` in a temporary folder and prints one JSON object: for each the command, the losses of
base and adapter in nats per supervised token, their ratio, and the seconds of training; for the default also what
`compare --json` gives.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KEPT = (
    "base_validation_loss",
    "validation_loss",
    "steps",
    "adapter_step",
    "seconds",
    "tokens_per_second",
    "peak_bytes",
)


def runs(shared: Path) -> dict[str, list[str]]:
    """Name -> arguments of `training-lens train`."""
    tiny = f"model.id={shared}/models/tinystories-656k"
    gsm8k, factory = f"{shared}/data/gsm8k", f"{shared}/data/llama_factory"
    both = f"data.train=[{factory}/alpaca_en_demo.json,{factory}/identity.json]"
    once = ["training.lr=1e-3", "training.epochs=1"]
    return {
        "embedded": ["+experiment=default"],
        "gsm8k": [tiny, f"data.train={gsm8k}/train.jsonl", f"data.validation={gsm8k}/test.jsonl", *once],
        "alpaca_identity_one_epoch": [tiny, both, "data.val_ratio=0.1", *once],
        "alpaca_identity_full": [
            *("+experiment=default-full", tiny, both, "data.val_ratio=0.1"),
            *("training.batch_size=4", "training.epochs=6", "training.lr=5e-3"),
        ],
    }


def command(*arguments: str) -> Any:
    """The JSON object that a training-lens command prints."""
    call = [sys.executable, "-m", "training_lens", *arguments, "--json"]
    return json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        output = f"output.base_output_dir={folder}"
        for name, arguments in runs(args.shared).items():
            summary = command("train", *arguments, output)
            results[name] = {
                "command": " ".join(["training-lens train", *arguments]),
                **{key: summary[key] for key in KEPT},
                "loss_ratio": summary["validation_loss"] / summary["base_validation_loss"],
            }
            if name == "embedded":
                comparison = command("compare", "--run", summary["run_dir"])
                results[name]["compare"] = {k: v for k, v in comparison.items() if k != "run"}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
