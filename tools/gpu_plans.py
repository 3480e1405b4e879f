"""The table of docs/training.md: what a run plans on GPUs of each size, from the shapes of three models alone.

    python tools/gpu_plans.py [--check]

Writes the table between the marks of the page, or with --check fails where it is another. Free memory is that of the
GPU less 1 GiB for the driver and torch. On a GPU the run measures a pass, and may take more tokens than are planned.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from training_lens.config.schema import ModelSection, PeftSection, TrainingConfig
from training_lens.inference.decoder import GPU_MEMORY_FACTOR
from training_lens.models.adapters import attach
from training_lens.models.fast.losses import chunk_rows
from training_lens.training.loop.memory_budget import (
    BUFFER_BYTES,
    USABLE_SHARE,
    Footprint,
    affordable_tokens,
    estimate_footprint,
)

PAGE = Path(__file__).parents[1] / "docs/training.md"
MARKS = ("<!-- table: tools/gpu_plans.py -->", "<!-- end of table -->")
CUDA = torch.device("cuda")
GIB = 2**30
# Memory in GiB, and a GPU of that size; the first two multiply no bf16 themselves and take fp16.
GPUS = {8: "RTX 2080", 16: "T4", 24: "RTX 4090", 48: "L40S", 80: "H100", 141: "H200"}
EMULATE_BF16 = ("RTX 2080", "T4")
# Llama-like shapes: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied.
SHAPES = {
    "125 M": (768, 2048, 12, 12, 12, 32_000, True),
    "1 B": (2048, 8192, 16, 32, 8, 128_256, True),
    "8 B": (4096, 14_336, 32, 32, 8, 128_256, False),
}


def build_skeleton(shape: tuple[Any, ...]) -> Any:
    """A Llama of this shape with LoRA of rank 16 on all linear layers, without weights."""
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "tie_word_embeddings",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dict(zip(names, shape, strict=True))))
        return attach(model.requires_grad_(False), PeftSection(r=16))


def describe_plan(memory: int, needs: Footprint, vocabulary: int, is_quantized: bool) -> str:
    """One cell: tokens of a micro-batch, rows of a chunk of logits, and how answers are decoded."""
    free = (memory - 1) * GIB
    fits = needs.fixed < USABLE_SHARE * free
    trains = (
        f"{affordable_tokens(free, needs, CUDA):,} / {chunk_rows(CUDA, vocabulary, 2):,}" if fits else "no training"
    )
    weights = needs.fixed - BUFFER_BYTES  # with the adapter's moments, which answers do without
    if weights > free:
        return "does not fit"
    decoding = "plain" if is_quantized else "merged" if free - weights > GPU_MEMORY_FACTOR * weights else "unmerged"
    return f"{trains} / {decoding}"


def build_table() -> str:
    """The table in Markdown."""
    header = ["model", *(f"{memory} GB ({name})" for memory, name in GPUS.items())]
    precision = ["precision", *("fp16" if name in EMULATE_BF16 else "bf16" for name in GPUS.values())]
    lines = [header, ["---"] * len(header), precision]
    for name, shape in SHAPES.items():
        skeleton = build_skeleton(shape).get_base_model()
        for bits in ("none", "4bit"):
            config = TrainingConfig(model=ModelSection(seq_len=512, quantization=bits))
            needs = estimate_footprint(skeleton, config, "bf16")
            cells = [describe_plan(memory, needs, shape[5], bits == "4bit") for memory in GPUS]
            lines.append([f"{name}, {'NF4' if bits == '4bit' else '16 bits'}", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    wanted = f"{before}{MARKS[0]}\n\n{build_table()}\n\n{MARKS[1]}{after}"
    if "--check" not in sys.argv:
        PAGE.write_text(wanted)
    elif wanted != text:
        raise SystemExit(f"{PAGE.name} has another table: python tools/gpu_plans.py")


if __name__ == "__main__":
    main()
