"""The speed of a training step on mixtures of experts, ours against transformers and PEFT in one process.

    python benchmarks/expert_speed.py [--only mixtral] [--batches 8]

The models of architecture_speed.py with all experts adapted (`peft.target_parameters=auto`, rank 16, so that each of
two experts per token has 8), float32, one thread. Both compute loss and gradients of the same batches of 8 GSM8K rows,
in turns: ours packed, as `train` does, theirs padded. Useful tokens (padding does not count) per second of the
process's own CPU time, which other programs on the machine do not change much; the ratio is the median over batches.
Printed and stored in `results/expert_speed.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architecture_speed import write_model
from compare_versions import ROWS
from machine import described

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.models.adapters import attach
from training_lens.models.factory import load_model, load_tokenizer
from training_lens.models.fast.engine import Engine

RESULTS = Path(__file__).parent / "results" / "expert_speed.json"
MIXTURES = ("mixtral", "qwen3 moe")
BATCH, WARM, LONGEST = 8, 1, 512


def measure_cpu_seconds(step: Callable[[], torch.Tensor], model: Any) -> float:
    """CPU seconds of a forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    started = time.process_time()
    step().backward()
    return time.process_time() - started


def measure(name: str, batches: int) -> dict[str, Any]:
    """Speeds of one model, and the ratio of ours to theirs."""
    with tempfile.TemporaryDirectory() as place:
        parameters = write_model(name, Path(place))
        section, peft = ModelSection(id=place), PeftSection(r=16)
        ours, theirs = (attach(load_model(section, torch.device("cpu"), "fp32"), peft).train() for _ in range(2))
        tokenizer = load_tokenizer(section)
    theirs.load_state_dict(ours.state_dict())
    engine = Engine(ours)
    lines = [json.loads(line) for line in ROWS.read_text().splitlines()[: BATCH * (batches + WARM)]]
    rows = [tokenizer(f"{line['question']}\n{line['answer']}")["input_ids"][:LONGEST] for line in lines]
    found: list[tuple[float, float]] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        ids = torch.tensor([[i for row in batch for i in row]])
        padded = tokenizer.pad({"input_ids": batch}, return_tensors="pt")
        labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
        lengths = [len(row) for row in batch]
        mask = torch.ones_like(ids, dtype=torch.bool)
        own = measure_cpu_seconds(lambda i=ids, m=mask, n=lengths: engine.loss_sum(i, m, n), ours)
        other = measure_cpu_seconds(lambda p=padded, y=labels: theirs(**p, labels=y, use_cache=False).loss, theirs)
        found.append((sum(lengths) / own, sum(lengths) / other))
    kept = found[WARM:]
    speeds = [statistics.median(column) for column in zip(*kept, strict=True)]
    ratio = statistics.median(own / other for own, other in kept)
    return {"parameters": parameters, "ours": speeds[0], "hf": speeds[1], "ours to hf": ratio, "packs": engine.can_pack}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(name, options.batches) for name in options.only}
    print(json.dumps(rows, indent=1))
    options.output.write_text(json.dumps({"machine": described(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
