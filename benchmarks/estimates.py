"""Estimates of `training-lens validate` against the runs that follow, for five configurations.

    python benchmarks/estimates.py [--shared ../shared]

Small models are measured whole, the one above 100 M parameters through thin relatives. The two larger models are Llamas
with random weights, built here. Prints one JSON object: for each configuration the command, the estimated and the
measured seconds of training and bytes at the peak, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from running import command


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
    small = build_llama(folder / "llama-40m", phi3, 512, 8)
    large = build_llama(folder / "llama-135m", phi3, 768, 16)
    once, few = "training.epochs=1", "data.val_ratio=0.02"
    return {
        "embedded default": ["+experiment=default"],
        "656 k, GSM8K": [tiny, f"data.train={gsm8k}", "data.max_examples=3000", few, once],
        "656 k, T0, DoRA, long tail": [
            *(tiny, f"data.train={shared}/data/t0_per_template/*.jsonl", "data.max_examples=2000", few),
            *("peft.use_dora=true", once, "training.gradient_accumulation_steps=4"),
        ],
        "40 M, Alpaca, rsLoRA": [
            *(f"model.id={small}", f"data.train={alpaca}", "data.max_examples=160", "peft.variant=rslora"),
            once,
        ],
        "135 M, GSM8K, gradient checkpointing": [
            *(f"model.id={large}", f"data.train={gsm8k}", "data.max_examples=48", once),
            "training.gradient_checkpointing=true",
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in configurations(args.shared, Path(folder)).items():
            output = f"output.base_output_dir={folder}/outputs"
            estimate = command("validate", *settings, output)["estimate"]
            summary = command("train", *settings, output)
            results[name] = {
                "command": " ".join(["training-lens train", *settings]).replace(folder, "."),
                "steps": summary["steps"],
                "estimated_seconds": round(estimate["seconds"], 2),
                "seconds": round(summary["seconds"], 2),
                "seconds_ratio": round(estimate["seconds"] / summary["seconds"], 3),
                "estimated_peak_bytes": estimate["peak_bytes"],
                "peak_bytes": summary["peak_bytes"],
                "peak_ratio": round(estimate["peak_bytes"] / summary["peak_bytes"], 3),
                "measured_layers": estimate["layers"],
            }
            print(name, results[name]["seconds_ratio"], results[name]["peak_ratio"], file=sys.stderr)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
