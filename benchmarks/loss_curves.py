"""The losses of a bf16 LoRA training by our kernels and by PEFT's own modules, and how far rounding alone moves them.

    python benchmarks/loss_curves.py [--shared ../shared] [--steps 200] [--output benchmarks/results/loss_curves.json]

One model, adapter, order of rows and optimizer; what differs is how a step's loss is computed:

- fused: as training computes it (lines of examples, kernels, the loss of supervised tokens alone);
- plain: padded rows through transformers' and PEFT's modules under autocast, and the loss that the model returns;
- plain_cut: the same, each step cut into more micro-batches; it differs by rounding alone, and is the yardstick;
- plain_fp32: plain in float32, which is what bf16 costs.

Losses are smoothed by their mean over the last 20 steps before they are compared. Prints the differences.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import described
from torch import Tensor

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.models.factory import load_model
from training_lens.models.fast.install import uninstall_kernels
from training_lens.training.adapted_base import build_trainer
from training_lens.training.loop.checkpoint_manager import CheckpointManager
from training_lens.training.loop.dataloader import DataLoader

SMOOTHED = 20  # steps
FEW_TOKENS = 256  # of a micro-batch where it is cut otherwise: one or two examples
WAYS: dict[str, dict[str, Any]] = {
    "fused": {"precision": "bf16"},
    "plain": {"precision": "bf16"},
    "plain_cut": {"precision": "bf16", "micro_batch_tokens": FEW_TOKENS},
    "plain_fp32": {"precision": "fp32"},
}


class PlainEngine:
    """The loss of padded rows as transformers gives it, by a model whose modules compute by themselves."""

    can_pack = False

    def __init__(self, model: Any) -> None:
        self.model = model
        uninstall_kernels(model)

    def loss_sum(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        packed_lengths: Sequence[int] = (),
        padded_lengths: Sequence[int] = (),
    ) -> Tensor:
        assert not packed_lengths, "rows are padded"
        labels = input_ids.masked_fill(~loss_mask, -100)
        loss: Tensor = self.model(input_ids=input_ids, labels=labels).loss
        return loss * int(loss_mask[:, 1:].sum())


def configured(model: str, rows: str, steps: int, output: str, training: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": {"id": model, "device": "cpu"},
            "data": {"train": [rows], "max_examples": 8 * steps},
            "training": {"epochs": 1, "batch_size": 8, **training},
            "output": {"base_output_dir": output},
        }
    )


def losses(config: TrainingConfig, fused: bool) -> np.ndarray:
    """The loss of each step, (steps,), in nats per supervised token of that step."""
    plan = TrainingWrapper(config).plan()
    model = load_model(plan.config.model, plan.processes.device, plan.precision)
    trainer = build_trainer(plan, model, CheckpointManager(Path("unused"), ""))
    if not fused:
        trainer.engine = PlainEngine(trainer.model)  # type: ignore[assignment]
        trainer.dataloader = DataLoader(plan.train, plan.processes, trainer.pad_id, is_packed=False)
    return np.array([trainer.train_step(step).loss for step in plan.schedule.iterate_steps()])


def smoothed(curve: np.ndarray) -> np.ndarray:
    """The mean over the last `SMOOTHED` steps, from where there are so many, (steps - SMOOTHED + 1,)."""
    return np.convolve(curve, np.ones(SMOOTHED) / SMOOTHED, "valid")


def apart(curve: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """The largest differences of two curves relative to the second: of smoothed losses, and of single steps."""
    pairs = {"smoothed": (smoothed(curve), smoothed(other)), "step": (curve, other)}
    return {name: float(np.max(np.abs(a - b) / b)) for name, (a, b) in pairs.items()}


def measure(model: str, rows: str, steps: int, output: str) -> dict[str, np.ndarray]:
    """The curve of each way."""
    return {
        name: losses(configured(model, rows, steps, output, training), fused=name == "fused")
        for name, training in WAYS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--shared", type=Path, default=here.parents[1] / "shared")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=here / "results/loss_curves.json")
    args = parser.parse_args()
    model, rows = args.shared / "models/tinystories-656k", args.shared / "data/gsm8k/train.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        curves = measure(str(model), str(rows), args.steps, folder)
    differences = {name: apart(curve, curves["plain"]) for name, curve in curves.items() if name != "plain"}
    result = {
        "machine": described(),
        "model": model.name,
        "rows": "GSM8K, 8 a step",
        "smoothed_over_steps": SMOOTHED,
        "against_plain": {name: {k: round(v, 7) for k, v in of.items()} for name, of in differences.items()},
        "losses": {name: [round(loss, 6) for loss in curve] for name, curve in curves.items()},
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["against_plain"], indent=2))


if __name__ == "__main__":
    main()
