"""Which of intruder directions and KL tells how much of the base's own text an adapter has forgotten?

    python benchmarks/published/forgetting.py [--shared ../shared]
        [--output benchmarks/results/published_forgetting.json]

Claimed: LoRA brings high-ranking singular vectors that the weight did not have ("intruder dimensions"), more of them at
higher learning rates, and they go with forgetting (arXiv 2410.21228). And: the forward KL from base to tuned model,
measured on the new task, predicts forgetting (arXiv 2509.04259).

Measured: one run for each learning rate of a grid and each seed (of the rows' order and the adapter's start), the same
number of steps. Of each trained adapter:

- forward KL, in nats per supervised token, on held-out rows of the task;
- the energy share of intruders among the first 10 left singular vectors of W + dW, mean over modules, with the
  threshold of the cosine swept; and ||dW|| / ||W||, the plainest measure of size, to hold both against;
- the rise of the loss on the base's own text. For tinystories-656k that is text sampled from it (its training text is
  not at hand), for the embedded model documents that it has not read, from the generator of its training text.

Spearman's rank correlation of each with that rise; intervals are 95 % of 2,000 bootstrap draws of seeds within each
learning rate. As everything grows with the rate, also the correlation within rates: of ranks among the runs of one
rate, shifted to mean 0, with a permutation test. On text sampled from the base the rise is, in expectation, the
forward KL on that very text; so KL is taken on the task and not there.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from correlation import spearman, with_interval, within_groups
from runs import SHORT_TOKENS, Setting, parsed, settings, trained, write_results

from training_lens import TrainingWrapper
from training_lens.core.modules import AdapterModule, adapter_modules
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.evaluation.evaluator import EvaluationOptions, evaluate_loss, paired_sums
from training_lens.measures.singular_values import find_intruders, update_norm
from training_lens.models.factory import load_model
from training_lens.training.plan import RunPlan
from training_lens.utils.devices import seed_everything
from training_lens.utils.processes import Processes

RATES = (3e-4, 1e-3, 2e-3, 5e-3, 1e-2)
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
PEFT = {"r": 16, "lora_alpha": 32.0}
STEPS, PROBE_ROWS, TEXTS, TEXT_TOKENS = 40, 32, 48, 128
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Judges:
    """What every adapter of a setting is held against."""

    way: EvaluationOptions
    task: TokenDataset
    own_text: TokenDataset
    base_loss: float  # of the base on its own text, nats per token


def judges(setting: Setting, folder: str) -> Judges:
    """Held-out rows of the task and text of the base's own."""
    probe = setting.short_rows(folder, data={"train": setting.heldout, "max_examples": PROBE_ROWS})
    plan = TrainingWrapper(probe).plan()
    base = load_model(plan.config.model, CPU, "fp32")
    texts = documents(plan.tokenizer) if setting.model == "embedded" else sampled(base, plan)
    way = EvaluationOptions(Processes(CPU), "fp32", 4096, plan.tokenizer.eos_token_id)
    own = TokenDataset.from_examples([as_example(i, ids) for i, ids in enumerate(texts)])
    return Judges(way, plan.train, own, evaluate_loss(base, own, way).loss)


def sampled(base: Any, plan: RunPlan) -> list[list[int]]:
    """Texts as the base tells them: drawn token by token from its own distribution, up to the end token."""
    end, start = plan.tokenizer.eos_token_id, plan.tokenizer.bos_token_id
    seed_everything(0)
    drawn = base.generate(
        torch.full((TEXTS, 1), start), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=TEXT_TOKENS - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return [[start, *row[: row.index(end) + 1 if end in row else None]] for row in drawn[:, 1:].tolist()]


def documents(tokenizer: Any) -> list[list[int]]:
    """Documents from the generator of the embedded model's training text, from the seed that it did not read."""
    sys.path.append("tools")
    from build_embedded_base import HELDOUT_SEED, text_of
    from small_world import documents as stream

    texts = (text_of(document) for document in islice(stream(HELDOUT_SEED), TEXTS))
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:TEXT_TOKENS] for text in texts]


def as_example(number: int, ids: list[int]) -> TokenizedExample:
    """A text of which every token but the first is judged."""
    tokens = np.array(ids, np.int32)
    return TokenizedExample("own text", number, tokens, np.ones(len(ids), bool), None, 0)


def run(setting: Setting, folder: str, judged: Judges, rate: float, seed: int) -> dict[str, float]:
    """One adapter trained, and what was measured of it."""
    training = {"lr": rate, "seed": seed, "max_steps": STEPS, "epochs": 10}
    model = trained(setting.short_rows(folder, peft=PEFT, training=training)).trainer.model
    on_task = paired_sums(model, judged.task, judged.way)
    tokens = on_task.base.tokens.sum()
    return {
        "lr": rate,
        "seed": seed,
        "task_loss_change": float((on_task.adapter.nll.sum() - on_task.base.nll.sum()) / tokens),
        "kl": float(on_task.kl.sum() / tokens),
        **of_weights(adapter_modules(model)),
        "forgetting": evaluate_loss(model, judged.own_text, judged.way).loss - judged.base_loss,
    }


@torch.no_grad()
def of_weights(modules: tuple[AdapterModule, ...]) -> dict[str, float]:
    """Means over modules: the update's strength, and the intruders' energy share for each threshold."""
    found: dict[str, list[float]] = {}
    for module in modules:
        weight, scaling = module.base_weight(), module.record.scaling
        assert weight is not None
        of_module = {"strength": update_norm(module.a, module.b, scaling) / weight.norm()}
        for threshold in THRESHOLDS:
            strange = find_intruders(weight, module.a, module.b, scaling, threshold=threshold)
            of_module[f"intruder_energy_{threshold}"] = strange.energy_share
        for name, value in of_module.items():
            found.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}


def compared(runs: list[dict[str, float]]) -> dict[str, Any]:
    """How well each measure tells the forgetting, over all runs and within learning rates."""
    columns = {name: np.array([r[name] for r in runs]) for name in runs[0]}
    rates, forgetting = columns["lr"], columns["forgetting"]
    named = [name for name in columns if name.startswith("intruder")]
    with_rate = {n: spearman(rates, columns[n]) for n in ("kl", *named, "strength", "forgetting")}
    return {
        "runs": len(runs),
        "with_learning_rate": with_rate,
        "with_forgetting": {
            name: {
                **with_interval(columns[name], forgetting, rates),
                "within_rates": within_groups(columns[name], forgetting, rates),
            }
            for name in ("kl", *named, "strength")
        },
    }


def of_setting(setting: Setting, seeds: int, rates: tuple[float, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        judged = judges(setting, folder)
        runs = [run(setting, folder, judged, rate, seed) for rate in rates for seed in range(seeds)]
    return {
        "base_loss_on_own_text": judged.base_loss,
        "own_text_tokens": int(judged.own_text.supervised_counts.sum()),
        "task_tokens": int(judged.task.supervised_counts.sum()),
        **compared(runs),
        "by_run": runs,
    }


def models(shared: Path, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    seeds, rates = (2, RATES[::3]) if quick else (4, RATES)
    for setting in settings(shared)[:2]:
        yield setting.name, of_setting(setting, seeds, rates)


def main() -> None:
    args = parsed(__doc__, "published_forgetting.json")
    started = time.perf_counter()
    given = {"steps": STEPS, **PEFT, "longest_row_tokens": SHORT_TOKENS, "directions": 10}
    results = {"settings": given, "models": dict(models(args.shared, args.quick))}
    write_results(args.output, results, time.perf_counter() - started)


if __name__ == "__main__":
    main()
