"""Peak memory of judging against that of one training step: a vocabulary of 50,257 and rows of 1,024 tokens.

    python benchmarks/evaluation_memory.py [--shared ../shared] [--output benchmarks/results/evaluation_memory.json]

A Llama of random weights (15 M parameters) with the tokenizer of GPT-2; texts of which every token counts, and long
prompts that are answered. Each command is a process of its own; the peak is that process's, with model and libraries.
Writes one JSON object: the peaks in bytes, and those of judging over those of training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BUILD = """
import shutil, sys
from pathlib import Path
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
folder, tokenizer = Path(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=50257, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=50256, eos_token_id=50256,
)).save_pretrained(folder)
AutoTokenizer.from_pretrained(tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
"""
WORDS = "the river runs past an old mill where nobody has worked since the winter of the great flood and so on ".split()


def peak_bytes(*arguments: str) -> int:
    """The most memory that a process of this command had."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)}: failed")
    return usage.ru_maxrss * 1024


def rows(folder: Path) -> dict[str, Path]:
    """Files of 24 rows of 1,024 tokens (a word is a token): texts, and prompts with answers of 100 words."""
    long = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(1100)) for i in range(24)]
    made = {
        "texts": [{"text": text} for text in long],
        "prompts": [{"question": " ".join(t.split()[:850]), "answer": " ".join(t.split()[-100:])} for t in long],
    }
    for name, values in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    return {name: folder / f"{name}.jsonl" for name in made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/evaluation_memory.json"))
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peak_bytes("-c", BUILD, str(folder / "model"), str(args.shared / "tokenizers/gpt2"))
        for kind, file in rows(folder).items():
            out = f"output.base_output_dir={folder}/{kind}"
            cut = "data.truncation=keep_start"
            model, data = f"model.id={folder}/model", f"data.train={file}"
            step = ["training.batch_size=4", "training.max_steps=1", "training.epochs=1"]
            trained = peak_bytes("-m", "training_lens", "train", model, data, cut, *step, out)
            judged = {
                command: peak_bytes(
                    *("-m", "training_lens", command, f"data.validation={file}", out, "evaluation.max_new_tokens=16"),
                )
                for command in ("evaluate", "compare")
            }
            results[kind] = {
                "training_step_bytes": trained,
                **{f"{command}_bytes": peak for command, peak in judged.items()},
                **{f"{command}_ratio": round(peak / trained, 3) for command, peak in judged.items()},
            }
            print(kind, results[kind], file=sys.stderr)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
