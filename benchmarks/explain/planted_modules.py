"""What `explain modules` finds where the truth is planted, and whether its order of modules is a good one.

    python benchmarks/explain/planted_modules.py train [--output benchmarks/results/explain_modules.json]
    python benchmarks/explain/planted_modules.py single | randomised | order

`train` makes the demo's run of 120 steps under --runs, which the others need. Each part adds its results to the file.

- single: of all factors B only one module's is left. That module must have all of the gain, and its layer's tests must
  say so.
- randomised: one layer's factors B are shuffled, entries and all, so that its update has the norm it had and no sense.
  That layer's share must be the worst of all, and the loss must fall without it. Each layer in turn.
- order: the loss without the n modules of the least gain by share, by norm of the update, and in 8 random orders.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from training_lens.analysis.explanations.loss_path import LossPath
from training_lens.analysis.explanations.module_gains import ModuleGains
from training_lens.analysis.explanations.module_measurement import measure_modules
from training_lens.analysis.run_rows import RowOptions, open_rows
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.display.progress import Progress
from training_lens.measures.singular_values import update_norm
from training_lens.merging.weight_update import LowRankUpdate, load_updates
from training_lens.runs.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SETTINGS = EvaluationSection(resamples=200)
SINGLES, ORDERS, SHARES = 5, 8, (0.1, 0.25, 0.5, 0.75, 0.9)
WEIGHTS = "adapter_model.safetensors"


def find_demo(runs: Path) -> RunFolder:
    """The demo's run, which `train` made."""
    (folder,) = (runs / "experiments/explain/runs").iterdir()
    return RunFolder(folder)


def train_demo(runs: Path) -> dict[str, Any]:
    """Train the demo's run: the embedded model and rows, 120 steps, as in docs/lens/knob.md."""
    from training_lens.config.compose import validate_values
    from training_lens.training.run import TrainingWrapper

    shutil.rmtree(runs, ignore_errors=True)
    values = {
        "training": {"max_steps": 120, "eval_steps": 40},
        "tracking": {"tensorboard": False, "samples": 0},
        "output": {"base_output_dir": str(runs), "experiment_name": "explain"},
    }
    started = time.perf_counter()
    summary = TrainingWrapper(validate_values(values)).train()
    return {"steps": 120, "seconds": time.perf_counter() - started, "validation_loss": summary.validation_loss}


@contextmanager
def changed_adapter(run: RunFolder, change: Callable[[dict[str, torch.Tensor]], None]) -> Iterator[Path]:
    """The run's adapter in a folder of its own, with its tensors changed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(run.adapter, Path(folder) / "adapter"))
        tensors = load_file(copy / WEIGHTS)
        change(tensors)
        save_file(tensors, copy / WEIGHTS, {"format": "pt"})
        yield copy


def explain(run: RunFolder, adapter: Path | None, rows: int) -> ModuleGains:
    """The shares and tests of an adapter on the first rows."""
    session, found = open_rows(run, RowOptions(max_examples=rows), adapter=adapter)
    return measure_modules(session, found, SETTINGS)


def measure_single(run: RunFolder) -> dict[str, Any]:
    """Adapters of which one module is left: the fraction of the gain that it gets, and its layer's tests."""
    names = sorted(name for name in load_file(run.adapter / WEIGHTS) if "lora_B" in name)
    found = []
    for kept in names[:: max(1, len(names) // SINGLES)][:SINGLES]:

        def keep_one(tensors: dict[str, torch.Tensor], kept: str = kept) -> None:
            for name in names:
                tensors[name] *= float(name == kept)

        with changed_adapter(run, keep_one) as adapter:
            gains = explain(run, adapter, 48)
        module = next(m for m in gains.modules if f"{m.name}.lora_B" in kept)
        layer = next(layer for layer in gains.layers if layer.name == module.layer_name)
        others = max(abs(m.share) for m in gains.modules if m is not module)
        found.append(
            {
                "module": module.name, "change": gains.change, "fraction": module.fraction, "others": others,
                "residual": gains.residual, "points": gains.points, "off": layer.off, "alone": layer.alone,
            }
        )  # fmt: skip
    return {"modules": found}


def measure_randomised(run: RunFolder) -> dict[str, Any]:
    """Each layer in turn with shuffled factors B: its place among the layers by share, and its tests."""
    session, rows = open_rows(run, RowOptions(max_examples=48))
    layers = [layer.name for layer in measure_modules(session, rows, SETTINGS).layers if layer.name.isdigit()]
    generator, found = torch.Generator().manual_seed(0), []
    for layer in layers:

        def shuffle(tensors: dict[str, torch.Tensor], layer: str = layer) -> None:
            for name in [n for n in tensors if f"layers.{layer}." in n and "lora_B" in n]:
                flat = tensors[name].flatten()
                tensors[name] = flat[torch.randperm(len(flat), generator=generator)].view_as(tensors[name]).contiguous()

        with changed_adapter(run, shuffle) as adapter:
            gains = explain(run, adapter, 48)
        test = next(test for test in gains.layers if test.name == layer)
        worst = max(gains.layers, key=lambda test: test.share)
        best = min(gains.layers, key=lambda test: test.off)
        found.append(
            {
                "layer": layer, "change": gains.change, "share": test.share, "off": test.off,
                "worst_by_share": worst.name, "worst_by_off": best.name, "residual": gains.residual,
                "points": gains.points,
            }
        )  # fmt: skip
    return {
        "layers": found,
        "named_by_share": sum(each["worst_by_share"] == each["layer"] for each in found),
        "named_by_off": sum(each["worst_by_off"] == each["layer"] for each in found),
        "off_below_0": sum(each["off"] < 0 for each in found),
        "count": len(found),
    }


def measure_order(run: RunFolder) -> dict[str, Any]:
    """The loss without n modules, in the order of three rules, on rows that the shares have not seen, too."""
    session, rows = open_rows(run, RowOptions())
    half = np.arange(len(rows.examples)) % 2 == 0
    chosen, other = rows.take(np.flatnonzero(half)), rows.take(np.flatnonzero(~half))
    gains = measure_modules(session, chosen, SETTINGS)
    norms = {
        name.removesuffix(".weight"): float(update_norm(update.a, update.b, update.factor))
        for name, update in load_updates(run.adapter).items()
        if isinstance(update, LowRankUpdate)
    }
    names = [module.name for module in gains.modules]
    share = {module.name: -module.share for module in gains.modules}
    generator = np.random.default_rng(0)
    orders = {"by share": sorted(names, key=lambda n: share[n]), "by norm of dW": sorted(names, key=lambda n: norms[n])}
    orders |= {f"random {i}": list(generator.permutation(names)) for i in range(ORDERS)}
    path = LossPath(session, other.dataset, 8192, Progress())
    tokens = path.dataset.supervised_counts.sum()
    sizes, losses = [round(share * len(names)) for share in SHARES], dict[str, list[float]]()
    for name, order in orders.items():
        losses[name] = []
        for size in sizes:
            dropped = set(order[:size])
            values = [float(n not in dropped) for n in path.multipliers.names]
            losses[name].append(float(path.measure_losses(values, name).sum() / tokens))
    ends = [float(path.measure_losses([at] * len(names), "end").sum() / tokens) for at in (0.0, 1.0)]
    drawn = np.array([losses.pop(f"random {i}") for i in range(ORDERS)])
    return {
        "modules": len(names), "dropped": sizes, "base_loss": ends[0], "loss": ends[1], **losses,
        "random, mean": drawn.mean(0).tolist(), "random, best": drawn.min(0).tolist(),
    }  # fmt: skip


PARTS: dict[str, Callable[[RunFolder], dict[str, Any]]] = {
    "single": measure_single,
    "randomised": measure_randomised,
    "order": measure_order,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("train", *PARTS))
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs/explain")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/explain_modules.json")
    args = parser.parse_args()
    found = train_demo(args.runs) if args.part == "train" else PARTS[args.part](find_demo(args.runs))
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results[args.part] = found
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
