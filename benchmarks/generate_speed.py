"""How fast answers are generated: ours against `generate` of transformers, adapter merged and beside the weights.

    python benchmarks/generate_speed.py [--batches 1 16 64] [--repetitions 3]
    python benchmarks/generate_speed.py --ngrams [--rows 3] [--repetitions 3]

A random Llama of 125 M parameters (30 layers, hidden 576) in bfloat16 with a random LoRA of rank 16 on all linear
layers reads prompts of 128 random tokens and says 48 more to each, greedily and without draft tokens: a random model
loops, so they would gain more than in real text. All contenders answer the same prompts in one process, in turn within
each repetition; a call before those that count warms each up, and for ours makes the decoder. Runs on CUDA where it is
there. Prints one JSON object:

- `tokens_per_second`: new tokens over the seconds of the whole call, reading the prompts included; medians.
- `linear_tokens_per_second`: what the linear layers and the head of the merged model would give by themselves, one
  `linear` call each, for a decoded token of every row.
- `same_answers`: rows whose 48 tokens are those of `generate` with the same kind of weights.
- `added_bytes`: the peak of memory within the first call, over what was in use before it.

With `--ngrams` the merged model answers single prompts of real text, with draft tokens and without: `ngram_speed.py`
says how. It needs the data in ../shared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from ngram_speed import measure_texts
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from training_lens import TrainingConfig
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.inference.generator import generate_answers
from training_lens.inference.session import Session, open_session
from training_lens.models.copies import copy_merged
from training_lens.utils.devices import device_name, peak_bytes, reset_peak, reset_process_peak, synchronize

PROMPT, NEW, VOCABULARY = 128, 48, 32011
PHI3 = 32064  # tokens of the tokenizer of the real texts, filled up as in its models
NEVER = 10**6  # a stop token that no model says
SLOW = 16  # rows: with more, one repetition is enough
Ids = list[list[int]]


def adapted_model(device: torch.device, vocabulary: int = VOCABULARY) -> Any:
    """The model with its adapter, whose B is large enough to be heard."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return adapted


def by_generate(model: Any, prompts: Ids) -> Ids:
    """What transformers says."""
    ids = torch.tensor(prompts, device=model.device)
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": NEVER, "pad_token_id": 0}
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    said: Ids = out[:, PROMPT:].tolist()
    return said


def by_us(session: Session, prompts: Ids) -> Ids:
    """What ours says, all prompts at once."""
    settings = InferenceSection(max_new_tokens=NEW, batch_tokens=len(prompts) * (PROMPT + NEW), drafts="off")
    return [list(answer.token_ids) for answer in generate_answers(session, prompts, settings)]


def timed(device: torch.device, call: Callable[[], Ids]) -> tuple[float, Ids]:
    """Seconds, and what was said."""
    synchronize(device)
    start = time.perf_counter()
    said = call()
    synchronize(device)
    return time.perf_counter() - start, said


def added_bytes(device: torch.device, call: Callable[[], Ids]) -> int:
    """The peak within the call over what was in use before it."""
    if device.type == "cuda":
        reset_peak(device)
        before = torch.cuda.memory_allocated(device)
    else:
        reset_process_peak()
        before = peak_bytes(device)
    call()
    return peak_bytes(device) - before


@torch.inference_mode()
def linear_tokens_per_second(model: Any, rows: int) -> float:
    """Rows over the seconds of one call of each linear layer of a plain model."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {
        layer.in_features: torch.randn(rows, layer.in_features, device=model.device, dtype=model.dtype)
        for layer in layers
    }
    seconds = []
    for _ in range(9):
        synchronize(model.device)
        start = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.in_features])
        synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    return rows / statistics.median(seconds)


def measured(contenders: dict[str, Callable[[Ids], Ids]], model: Any, rows: int, repetitions: int) -> dict[str, Any]:
    """All contenders on prompts of so many rows."""
    device = model.device
    prompts = torch.randint(3, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(rows)).tolist()
    calls = {name: partial(contender, prompts) for name, contender in contenders.items()}
    added = {name: added_bytes(device, call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    said: dict[str, Ids] = {}
    for _ in range(repetitions if rows <= SLOW else 1):
        for name, call in calls.items():
            taken, said[name] = timed(device, call)
            seconds[name].append(taken)
    linear = linear_tokens_per_second(model, rows)
    rates = {name: rows * NEW / statistics.median(taken) for name, taken in seconds.items()}
    return {
        "tokens_per_second": rates,
        "against_generate": {kind: rates[f"ours {kind}"] / rates[f"generate {kind}"] for kind in ("merged", "adapter")},
        "linear_tokens_per_second": linear,
        "share_of_linear": {name: rate / linear for name, rate in rates.items()},
        "same_answers": {
            kind: sum(a == b for a, b in zip(said[f"ours {kind}"], said[f"generate {kind}"], strict=True))
            for kind in ("merged", "adapter")
        },
        "added_bytes": added,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The processor and the software."""
    return {
        "processor": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--ngrams", action="store_true", help="measure draft tokens instead")
    parser.add_argument("--rows", type=int, default=3, help="prompts of each kind of text, with --ngrams")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.ngrams:
        texts = measure_texts(copy_merged(adapted_model(device, PHI3)), args.rows, args.repetitions)
        print(json.dumps({"machine": describe_machine(device), "texts": texts}, indent=2))
        return
    adapted = adapted_model(device)
    merged = copy_merged(adapted)
    some = open_session(TrainingConfig.model_validate({"inference": {"adapter": "none"}}))
    some = replace(some, device=device, stop_ids=frozenset({NEVER}))
    contenders: dict[str, Callable[[Ids], Ids]] = {
        "generate merged": partial(by_generate, merged),
        "ours merged": partial(by_us, replace(some, model=merged)),
        "generate adapter": partial(by_generate, adapted),
        "ours adapter": partial(by_us, replace(some, model=adapted)),
    }
    batches = {rows: measured(contenders, merged, rows, args.repetitions) for rows in args.batches}
    machine = describe_machine(device)
    print(json.dumps({"machine": machine, "prompt_tokens": PROMPT, "new_tokens": NEW, "batches": batches}, indent=2))


if __name__ == "__main__":
    main()
