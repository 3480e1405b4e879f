"""Estimates against the runs that follow, for twelve configurations, on a quiet machine or beside a busy process.

    python benchmarks/estimates.py quiet [--shared ../shared] [--seconds 250] [--output FILE]
    python benchmarks/estimates.py busy

Two estimates: that of `training-lens validate`, and the run's own after its fifth step. Small models are measured
whole, those above 100 M parameters through thin relatives. The larger models are Llamas with random weights, built
here. A busy process multiplies matrices on as many threads as there are cores, from before the estimate to the end of
the run. Kept for each configuration: the command, the estimated and the measured seconds of training and bytes at the
peak, their ratios, and the load average (of one minute) before and after, which says whether the machine was quiet.
The script starts no configuration after `--seconds`, and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import described
from running import command

BUSY = "import torch\na = torch.randn(2048, 2048)\nwhile True: a @ a"


def build_llama(folder: Path, tokenizer: Path, hidden: int, layers: int) -> Path:
    """A Llama of random weights with the tokenizer of another folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def configurations(shared: Path, folder: Path) -> dict[str, list[str]]:
    """Name -> settings."""
    tiny, phi3 = f"model.id={shared}/models/tinystories-656k", shared / "tokenizers/phi3"
    gsm8k, alpaca = f"{shared}/data/gsm8k/train.jsonl", f"{shared}/data/llama_factory/alpaca_en_demo.json"
    small = f"model.id={build_llama(folder / 'llama-40m', phi3, 512, 8)}"
    large = f"model.id={build_llama(folder / 'llama-135m', phi3, 768, 16)}"
    once, few = "training.epochs=1", "data.val_ratio=0.02"
    rows, long_rows = f"data.train={gsm8k}", f"data.train={alpaca}"
    tail = [tiny, f"data.train={shared}/data/t0_per_template/*.jsonl", "data.max_examples=1000", few, once]
    return {
        "embedded default": ["+experiment=default", "training.max_steps=250"],
        "embedded, rank 64, lens off": ["peft.r=64", "lens.enabled=false", "training.max_steps=150"],
        "embedded, PiSSA, bf16": ["peft.init=pissa", "training.precision=bf16", "training.max_steps=150"],
        "embedded, batch 32": ["training.batch_size=32", "training.max_steps=60"],
        "656 k, GSM8K": [tiny, rows, "data.max_examples=2000", few, once],
        "656 k, GSM8K, dropout": [tiny, rows, "data.max_examples=1600", few, once, "peft.lora_dropout=0.1"],
        "656 k, T0, DoRA, long tail": [*tail, "peft.use_dora=true", "training.gradient_accumulation_steps=4"],
        "656 k, T0, micro-batches of 1024": [*tail, "training.micro_batch_tokens=1024"],
        "40 M, Alpaca, rsLoRA": [small, long_rows, "data.max_examples=120", "peft.variant=rslora", once],
        "40 M, GSM8K, gradient checkpointing": [
            *(small, rows, "data.max_examples=120", once, "training.gradient_checkpointing=true"),
        ],
        "135 M, GSM8K": [large, rows, "data.max_examples=48", once],
        "135 M, GSM8K, gradient checkpointing": [
            *(large, rows, "data.max_examples=48", once, "training.gradient_checkpointing=true"),
        ],
    }  # fmt: skip


@contextmanager
def beside(busy: bool) -> Iterator[None]:
    """Inside the block a process multiplies matrices, if `busy`."""
    process = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def measure(settings: list[str], folder: str) -> dict[str, Any]:
    """Both estimates of one configuration, and what it took."""
    output, before = f"output.base_output_dir={folder}/outputs", os.getloadavg()[0]
    estimate = command("validate", *settings, output)["estimate"]
    summary = command("train", *settings, output)
    own = summary["estimate"] or {}
    result = {
        "command": " ".join(["training-lens train", *settings]).replace(folder, "."),
        "steps": summary["steps"],
        "seconds": round(summary["seconds"], 2),
        "peak_bytes": summary["peak_bytes"],
        "measured_layers": estimate["layers"],
        "load": [round(before, 2), round(os.getloadavg()[0], 2)],
    }
    for name, found in (("validate", estimate), ("own", own)):
        if found:
            result[name] = {
                **{key: round(found[key], 2) for key in ("seconds", "seconds_low", "seconds_high")},
                "peak_bytes": found["peak_bytes"],
                "seconds_ratio": round(found["seconds"] / summary["seconds"], 3),
                "is_inside": found["seconds_low"] <= summary["seconds"] <= found["seconds_high"],
                "peak_ratio": round(found["peak_bytes"] / summary["peak_bytes"], 3),
                "others_share": round(found["others_share"], 3),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", choices=("quiet", "busy"))
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no configuration after so many")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/estimates.json"))
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results = {key: results[key] for key in ("quiet", "busy") if key in results}  # not those of earlier versions
    found, started = results.setdefault(args.load, {}), time.monotonic()
    results["machine"] = described()
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in configurations(args.shared, Path(folder)).items():
            if name in found or time.monotonic() - started > args.seconds:
                continue
            with beside(args.load == "busy"):
                found[name] = measure(settings, folder)
            args.output.write_text(json.dumps(results, indent=2) + "\n")
            print(name, {k: found[name][k] for k in ("validate", "own") if k in found[name]}, file=sys.stderr)


if __name__ == "__main__":
    main()
