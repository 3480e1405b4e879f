"""What the trainers of train_speed.py are given: a model of random weights, rows, and a job that names both."""

from __future__ import annotations

import glob
import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
PEER_MODES = {  # mode -> virtual environment, script
    "hf": ("hf", "hf.py"),
    "hf_group": ("hf", "hf.py"),
    "trl": ("hf", "hf.py"),
    "trl_pack": ("hf", "hf.py"),
    "llamafactory": ("llamafactory", "llama_factory.py"),
    "litgpt": ("litgpt", "lit_gpt.py"),
    "unsloth": ("unsloth", "unsloth_sft.py"),
}
OUR_MODES = ("ours", "ours_lens")
SHAPES: dict[str, dict[str, int]] = {  # Llamas; 125m is shared/bench/peers.py's, 1b and 8b are Llama 3's
    name: dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads"), sizes, strict=True))
    for name, sizes in {
        "1m": (64, 172, 4, 2, 1),
        "8m": (192, 512, 8, 3, 1),
        "25m": (320, 864, 14, 5, 1),
        "60m": (448, 1216, 20, 7, 1),
        "125m": (576, 1536, 30, 9, 3),
        "350m": (960, 2560, 32, 15, 5),
        "1b": (2048, 8192, 16, 32, 8),
        "8b": (4096, 14336, 32, 32, 8),
    }.items()
}  # fmt: skip
WORDS = "the of and to in is was he for it with as his on be at by had not are but from or have an they which".split()
ROW_SECONDS = 3600  # the longest that one training may take


@dataclass(frozen=True)
class Job:
    """One training: which model, rows and settings; `tokens` are the rows as Training Lens tokenizes them."""

    mode: str
    model: str
    rows: str
    tokens: str
    output: str
    batch: int = 8
    lr: float = 2e-4
    rank: int = 16
    alpha: int = 32
    seq_len: int = 1024
    truncation: str = "keep_end"


def write_model(folder: Path, shape: str, tokenizer: Path) -> int:
    """A Llama of random weights in bf16, with the tokenizer; its number of parameters."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.pad_token = words.pad_token or words.eos_token
    config = LlamaConfig(
        vocab_size=len(words),
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **SHAPES[shape],
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def read_pairs(pattern: str, count: int) -> list[tuple[str, str]]:
    """(prompt, completion) of the first rows of the files that match; of several files, shuffled by seed 0."""
    paths = sorted(glob.glob(pattern))  # noqa: PTH207 (absolute too)
    rows = [json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if len(paths) > 1:
        random.Random(0).shuffle(rows)
    keys = ("question", "answer") if rows and "question" in rows[0] else ("prompt", "completion")
    return [(row[keys[0]], row[keys[1]]) for row in rows[:count]]


def long_pairs(length: int, count: int) -> list[tuple[str, str]]:
    """Pairs of drawn words: the answer has under half of `length` tokens, the prompt more than the rest.

    With prompts cut at their start, as they are unless a job says otherwise, rows have exactly `length` tokens.
    """
    draw = random.Random(0)
    return [
        (" ".join(draw.choices(WORDS, k=length)), " ".join(draw.choices(WORDS, k=length // 3))) for _ in range(count)
    ]


def write_pairs(pairs: list[tuple[str, str]], path: Path) -> None:
    lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def python_of(mode: str) -> Path:
    """The interpreter that a mode runs under."""
    if mode in OUR_MODES:
        return Path(sys.executable)
    return ROOT / f".venv-peers-{PEER_MODES[mode][0]}" / "bin" / "python"


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    """Train in a process of its own; what it measured, or `failed` with the last line that it said."""
    path = folder / f"{job.mode}.json"
    path.write_text(json.dumps(asdict(job)))
    script = HERE / "train_ours.py" if job.mode in OUR_MODES else HERE / "peers" / PEER_MODES[job.mode][1]
    call = [str(python_of(job.mode)), str(script), str(path)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=ROW_SECONDS, cwd=folder)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        measured: dict[str, Any] = json.loads(lines[-1])
        return measured
    print(done.stderr[-4000:], file=sys.stderr)
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return {"failed": said[-1][-300:]}
