"""Do ranks 4, 16 and 64 share their loss curve at the start?

    python benchmarks/published/ranks.py [--shared ../shared] [--output benchmarks/results/published_ranks.json]

Claimed: with the update scaled by alpha/r the first part of the learning curve is the same for every rank ("LoRA
Without Regret", Thinking Machines 2025, with Adam); with alpha/sqrt(r) (rsLoRA, arXiv 2312.03732) the scale of higher
ranks is larger, so the curves must separate.

Measured in two parts, on two models:

- curves: AdamW at a constant rate, one order of the rows for all runs, each rank and scaling from three starts of A.
  Both scalings are the same at r = 16 (s = 2). The range over ranks (largest loss of a step minus smallest, mean over
  a window of steps and over starts) is held against the range that three starts of one rank have: chance alone.
- first step: one step of plain SGD with rate eta. G = dL/dW comes from the frozen weight itself, made to take a
  gradient. PEFT starts with B = 0 and A uniform with variance 1/(3 in), so dW = -eta s^2 G A^T A, and in expectation
  <dW, G> / ||G||_F^2 = -eta s^2 r / (3 in). Of that the spread over A is known, too: with M = G^T G / ||G||_F^2,
  relative variance (2 ||M||_F^2 - 1.2 sum M_ii^2) / r, from the fourth moment of the uniform distribution.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from runs import Record, Setting, parsed, settings, trained, write_results

from training_lens import TrainingWrapper
from training_lens.config.schema import PeftSection
from training_lens.core.modules import AdapterModule, adapter_modules
from training_lens.data.batching import collate
from training_lens.data.examples import Batch
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.factory import load_model
from training_lens.models.token_scores import supervised_scores
from training_lens.training.loop.callbacks import Callback
from training_lens.training.plan import RunPlan
from training_lens.utils.devices import seed_everything

RANKS = (4, 16, 64)
ALPHAS = {"lora": 32.0, "rslora": 8.0}  # s = 2 at r = 16 with either
ETA, LR = 0.1, 1e-3


class NewStart(Callback):
    """Draws A anew, as PEFT does, so that one order of the rows meets several starts."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_start(self, trainer: Any) -> None:
        torch.manual_seed(self._seed)
        for module in adapter_modules(trainer.model):
            layer: Any = module.module
            layer.reset_lora_parameters(module.record.adapter, init_lora_weights=True)


def curve(setting: Setting, folder: str, variant: str, rank: int, start: int, steps: int) -> list[float]:
    """The training loss of each step."""
    config = setting.config(
        folder,
        peft={"variant": variant, "r": rank, "lora_alpha": ALPHAS[variant]},
        training={"lr": LR, "max_steps": steps, "epochs": 10},
    )
    record: Record = trained(config, NewStart(start))
    return record.losses


def curves(setting: Setting, folder: str, starts: int, steps: int) -> dict[str, Any]:
    """Every curve, and the ranges over ranks and over starts in windows that double in length."""
    losses = {
        variant: np.array([[curve(setting, folder, variant, r, s, steps) for s in range(starts)] for r in RANKS])
        for variant in ALPHAS
    }  # (ranks, starts, steps)
    ends = [end for end in (10, 20, 40) if end <= steps]
    windows = [compared(losses, begin, end) for begin, end in zip([1, *ends], ends, strict=False)]
    return {
        "steps": steps,
        "starts": starts,
        "windows": windows,
        "mean_curves": {
            variant: {str(r): list(map(float, runs.mean(0))) for r, runs in zip(RANKS, by_rank, strict=True)}
            for variant, by_rank in losses.items()
        },
    }


def compared(losses: dict[str, np.ndarray], begin: int, end: int) -> dict[str, Any]:
    """The ranges in the losses after `begin` and up to `end` steps; the first loss is before any step."""
    row: dict[str, Any] = {"after_steps": [begin, end - 1]}
    for variant, runs in losses.items():
        part = runs[:, :, begin:end]  # (ranks, starts, steps)
        row[variant] = {
            "range_over_ranks": float(np.ptp(part, axis=0).mean()),
            "range_over_starts": float(np.ptp(part, axis=1).mean()),
            "mean_loss": {str(r): float(v) for r, v in zip(RANKS, part.mean((1, 2)), strict=True)},
        }
    return row


def first_steps(setting: Setting, folder: str, seeds: int) -> list[dict[str, Any]]:
    """Measured over predicted <dW, G> of the first SGD step, for each scaling and rank."""
    plan = TrainingWrapper(setting.config(folder)).plan()
    rows = []
    for variant, alpha in ALPHAS.items():
        for rank in RANKS:
            peft = PeftSection(variant=variant, r=rank, lora_alpha=alpha)
            ratios, spreads = zip(*(first_step(plan, peft, seed) for seed in range(seeds)), strict=True)
            rows.append({"variant": variant, "rank": rank, **summarized(np.array(ratios), np.array(spreads))})
    return rows


def first_step(plan: RunPlan, peft: PeftSection, seed: int) -> tuple[list[float], list[float]]:
    """Of each module: measured over predicted, and the standard deviation over A that this should have."""
    batch = first_batch(plan, seed)
    seed_everything(seed)
    model = attach(load_model(plan.config.model, torch.device("cpu"), "fp32"), peft)
    optimizer = torch.optim.SGD([p for _, p in trainable_parameters(model)], lr=ETA)
    modules = adapter_modules(model)
    for module in modules:
        frozen_weight(module).requires_grad_(True)  # gives G; the optimizer does not know it
    supervised_scores(model, batch.input_ids, batch.loss_mask).nll.mean().backward()
    optimizer.step()
    return [list(column) for column in zip(*(of_module(m) for m in modules), strict=True)]


def first_batch(plan: RunPlan, seed: int) -> Batch:
    step = next(replace(plan.schedule, seed=seed).iterate_steps())
    return collate([plan.train[int(i)] for i in step.examples], plan.tokenizer.eos_token_id)


def frozen_weight(module: AdapterModule) -> Any:
    layer: Any = module.module
    return layer.get_base_layer().weight


@torch.no_grad()
def of_module(module: AdapterModule) -> tuple[float, float]:
    record = module.record
    g = frozen_weight(module).grad.double()  # (out, in)
    change = record.scaling * module.b.double() @ module.a.double()
    measured = (change * g).sum() / g.square().sum()
    predicted = -ETA * record.scaling**2 * record.rank / (3 * record.in_features)
    m = g.T @ g / g.square().sum()  # (in, in), trace 1
    variance = (2 * m.square().sum() - 1.2 * m.diagonal().square().sum()) / record.rank
    return float(measured / predicted), float(variance.sqrt())


def summarized(ratios: np.ndarray, spreads: np.ndarray) -> dict[str, Any]:
    """Mean over modules and seeds, its standard error from the seeds, and the spread of single modules.

    Args:
        ratios: (seeds, modules) measured over predicted; `spreads` their predicted standard deviations.
    """
    by_seed = ratios.mean(1)
    return {
        "seeds": ratios.shape[0],
        "modules": ratios.shape[1],
        "mean_ratio": float(ratios.mean()),
        "standard_error": float(by_seed.std(ddof=1) / np.sqrt(len(by_seed))),
        "spread": float(np.sqrt(np.mean((ratios - 1) ** 2))),
        "predicted_spread": float(np.sqrt(np.mean(spreads**2))),
    }


def measured(of: Sequence[Setting], quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    starts, steps, seeds = (2, 10, 2) if quick else (3, 40, 10)
    for setting in of:
        with tempfile.TemporaryDirectory() as folder:
            first = first_steps(setting, folder, seeds)
            yield setting.name, {"first_sgd_step": first, "adamw_curves": curves(setting, folder, starts, steps)}


def main() -> None:
    args = parsed(__doc__, "published_ranks.json")
    started = time.perf_counter()
    models = dict(measured(settings(args.shared)[:2], args.quick))
    given = {"lr": LR, "eta": ETA, "alpha": ALPHAS}
    write_results(args.output, {"settings": given, "models": models}, time.perf_counter() - started)


if __name__ == "__main__":
    main()
