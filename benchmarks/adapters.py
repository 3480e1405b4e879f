"""Each kind of adapter and optimizer once on the embedded model: that it runs and learns, as docs/adapters.md shows it.

    python benchmarks/adapters.py

Trains on 1,024 rows, one epoch, one seed, and prints one JSON object: for each the settings, the trained parameters and
the validation losses of base and adapter in nats per supervised token.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

from running import command

COMMON = ["training.epochs=1", "data.max_examples=1024"]
KINDS = {
    "lora": [],
    "rslora": ["peft.variant=rslora"],
    "dora": ["peft.use_dora=true"],
    "pissa": ["peft.init=pissa"],
    "lora_plus": ["peft.lora_plus_ratio=8"],
    "whole_head": ["peft.modules_to_save=[lm_head]"],
    "adafactor": ["training.optimizer=adafactor"],
    "adamw_8bit": ["training.optimizer=adamw_8bit"],
    "qlora": ["+experiment=qlora", "training.lr=null", "training.batch_size=8"],
}


def measured(settings: list[str], output: str) -> dict[str, Any]:
    """What one run gives."""
    summary = command("train", *COMMON, *settings, f"output.base_output_dir={output}")
    kept = ("trainable_parameters", "steps", "base_validation_loss", "validation_loss")
    return {"settings": settings, **{key: summary[key] for key in kept}, "run": summary["run_dir"]}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = {name: measured(settings, folder) for name, settings in KINDS.items()}
        onward = [f"peft.from_adapter={results['pissa']['run']}", "training.max_steps=64", "training.lr=5e-4"]
        results["on_from_pissa"] = {**measured(onward, folder), "settings": ["peft.from_adapter=PISSA", *onward[1:]]}
    print(json.dumps({n: {k: v for k, v in r.items() if k != "run"} for n, r in results.items()}, indent=2))


if __name__ == "__main__":
    main()
