"""Real runs through the command: the embedded default and a real model on real files, as docs/results.md shows them.

    python benchmarks/real_files.py [--shared ../shared] [--only NAME ...] [--output benchmarks/results/real_files.json]

Runs each command with `--json` in a temporary folder and writes one JSON object (a name that is there is replaced): for
each the command, the losses of base and adapter in nats per supervised token, their ratio, the seconds of training; of
some runs also what `compare --json` gives.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from running import command

KEPT = (
    "base_validation_loss",
    "validation_loss",
    "steps",
    "adapter_step",
    "seconds",
    "tokens_per_second",
    "peak_bytes",
)

COMPARED = {  # what is compared, and on how much of it
    "embedded": ["evaluation.max_new_tokens=64"],
    "gsm8k": ["evaluation.max_examples=200", "evaluation.max_new_tokens=128"],
    "glaive_sharegpt": ["evaluation.max_new_tokens=96"],
    "t0_domains": ["evaluation.max_new_tokens=64"],
}


def runs(shared: Path) -> dict[str, list[str]]:
    """Name -> arguments of `training-lens train`."""
    tiny = f"model.id={shared}/models/tinystories-656k"
    gsm8k, factory = f"{shared}/data/gsm8k", f"{shared}/data/llama_factory"
    both = f"data.train=[{factory}/alpaca_en_demo.json,{factory}/identity.json]"
    once = ["training.lr=1e-3", "training.epochs=1"]
    tenth, thrice = "data.val_ratio=0.1", "training.epochs=3"
    return {
        "embedded": ["+experiment=default"],
        "gsm8k": [tiny, f"data.train={gsm8k}/train.jsonl", f"data.validation={gsm8k}/test.jsonl", *once],
        "alpaca_identity_one_epoch": [tiny, both, "data.val_ratio=0.1", *once],
        "alpaca_identity_full": [
            *("+experiment=default-full", tiny, both, "data.val_ratio=0.1"),
            *("training.batch_size=4", "training.epochs=6", "training.lr=5e-3"),
        ],
        "glaive_sharegpt": [tiny, f"data.train={factory}/glaive_toolcall_en_demo.json", tenth, thrice],
        "kto_messages": [tiny, f"data.train={factory}/kto_en_demo.json", tenth, thrice],
        "c4_text": [tiny, f"data.train={factory}/c4_demo.jsonl", tenth, thrice],
        "t0_domains": [tiny, f"data.train={shared}/data/t0_per_template/*.jsonl", "data.domain.per_file=true", tenth],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/real_files.json"))
    args = parser.parse_args()
    chosen = {name: a for name, a in runs(args.shared).items() if name in (args.only or runs(args.shared))}
    for name, arguments in chosen.items():
        results = json.loads(args.output.read_text()) if args.output.is_file() else {}
        results[name] = measured(name, arguments)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


def measured(name: str, arguments: list[str]) -> dict[str, Any]:
    """What one run gives."""
    with tempfile.TemporaryDirectory() as folder:
        summary = command("train", *arguments, f"output.base_output_dir={folder}")
        result = {
            "command": " ".join(["training-lens train", *arguments]),
            **{key: summary[key] for key in KEPT},
            "loss_ratio": summary["validation_loss"] / summary["base_validation_loss"],
        }
        if name in COMPARED:
            comparison = command("compare", "--run", summary["run_dir"], *COMPARED[name])
            result["compare"] = {k: v for k, v in comparison.items() if k not in ("run", "models")}
            result["compare_command"] = " ".join(["training-lens compare", *COMPARED[name]])
        return result


if __name__ == "__main__":
    main()
