"""Training and decoding speed by architecture, against plain transformers and PEFT, and against earlier commits.

    python benchmarks/architecture_speed.py [--source DIR] [--only llama phi3] [--repeats 3]

Models of some 20 M random weights, mixtures of more, in bf16 where oneDNN computes that and else in float32, with LoRA
of rank 16 on all linear layers and experts, and a Llama in 4 bits. Ours are the command `train` and the answers that
`infer` gives (decode_speed.py), of this checkout and of DIR, in processes of their own. HF is a loop over padded
batches of the same rows with PEFT and AdamW, and `generate`, on the model and adapter of ours.

Printed and stored in `results/architecture_speed.json`: useful tokens per second of training (padding does not count),
the median over steps without the first two; new tokens per second of the adapter's greedy answers to 1 and 8 prompts of
64 tokens, reading the prompts included, by CPU time. This checkout, DIR and HF take turns on one core, in the other
order at every second repeat; `taskset -c 0` keeps them off a core that is in use. Speeds are medians over the repeats,
ratios geometric means; `--only` joins its rows to those that are stored. What fails has its reason in place of numbers.
Needs Linux, GSM8K rows and Phi-3's tokenizer in ../shared; two minutes for each architecture and repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare_versions import PHI3, QUIET, ROWS, describe_commit, run_command, run_side_by_side, time_answers
from machine import PRECISION, described
from training_jobs import ROOT

RESULTS = Path(__file__).parent / "results" / "architecture_speed.json"
SIZES = {
    "hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 8, "num_attention_heads": 5,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
WINDOW = {"sliding_window": 256}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "phi3": ("Phi3", {}),
    "gemma2": ("Gemma2", WINDOW),
    "gemma3": ("Gemma3Text", WINDOW),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", WINDOW),
    "llama, 4 bits": ("Llama", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 448}),
    "qwen3 moe": ("Qwen3Moe", {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 112}),
}
DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}[PRECISION]
BATCH, WARM, PROMPT, NEW, ROWS_DECODED = 8, 2, 64, 32, (1, 8)
Speeds = dict[str, float]


def write_model(name: str, folder: Path) -> int:
    """A model of random weights with Phi-3's tokenizer; its number of parameters."""
    import transformers

    kind, more = ARCHITECTURES[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(PHI3)
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **SIZES | special | more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def measure_ours(checkout: Path, folder: Path, name: str, model: Path, examples: int) -> Speeds:
    """Speeds of the product in a checkout; its run is `run` in `folder`."""
    run_command(
        checkout, folder, "train", f"data.train={ROWS}", "output.run_id=run", *QUIET, f"model.id={model}",
        "lens.enabled=false", f"training.precision={PRECISION}", "model.seq_len=512", f"data.max_examples={examples}",
        f"training.batch_size={BATCH}", "training.epochs=1", "peft.r=16",
        f"model.quantization={'4bit' if '4 bits' in name else 'none'}",
    )  # fmt: skip
    run = folder / "outputs/experiments/default/runs/run"
    steps = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    rates = [step["tokens"] / step["seconds"] for step in steps if step["kind"] == "step"]
    shape = ("--prompt", str(PROMPT), "--new", str(NEW))
    decoding = time_answers(checkout, folder, "run", "--rows", *map(str, ROWS_DECODED), *shape)
    return {"train": statistics.median(rates[WARM:]), **decoding}


def measure_hf(name: str, model: Path, adapter: Path, examples: int) -> Speeds:
    """Speeds of plain transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
    )  # fmt: skip
    options = {"quantization_config": quantized} if "4 bits" in name else {}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE, **options)
    adapted = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line) for line in ROWS.read_text().splitlines()[:examples]]
    texts = [f"{line['question']}\n{line['answer']}" for line in lines]
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=2e-4)
    rates = []
    for start in range(0, examples, BATCH):
        begun = time.perf_counter()
        batch = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16"):
            adapted(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(int(batch["attention_mask"].sum()) / (time.perf_counter() - begun))
    return {"train": statistics.median(rates[WARM:]), **_time_generate(adapted.eval())}


def _time_generate(model: Any) -> Speeds:
    found = {}
    for rows in ROWS_DECODED:
        ids = torch.randint(3, 32_000, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
        seconds = []
        for _ in range(3):
            begun = time.process_time()
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                    min_new_tokens=NEW,
                )  # fmt: skip
            seconds.append(time.process_time() - begun)
        assert out.shape[1] == PROMPT + NEW, "every row says as much"
        found[f"decode {rows}"] = rows * NEW / statistics.median(seconds[1:])
    return found


def try_measure(checkout: Path, folder: Path, name: str, model: Path, examples: int) -> dict[str, Any]:
    """Speeds of ours, or why there are none."""
    folder.mkdir()
    try:
        return measure_ours(checkout, folder, name, model, examples)
    except subprocess.CalledProcessError as error:
        return {"failed": _read_text(error.stderr)[-300:]}


def _read_text(output: str | bytes) -> str:
    return (output if isinstance(output, str) else output.decode()).strip()


def call_hf(name: str, model: Path, adapter: Path, examples: int) -> dict[str, Any]:
    """Speeds of HF in a process of its own, or why there are none."""
    call = [sys.executable, __file__, "--hf", name, str(model), str(adapter), "--examples", str(examples)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr.strip()[-300:]}


def measure(name: str, sources: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Speeds of one architecture by each source and by HF, and the ratios of ours to theirs."""
    repeats: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        parameters = write_model(name, model)
        for repeat in range(options.repeats):
            folders = {source: Path(place) / f"{source}-{repeat}" for source in sources}
            tasks = {
                source: partial(try_measure, checkout, folders[source], name, model, options.examples)
                for source, checkout in sources.items()
            }
            found = run_in_turn(tasks, is_reversed=repeat % 2 == 1)
            adapter = folders["ours"] / "outputs/experiments/default/runs/run/artifacts/adapter"
            hf = partial(call_hf, name, model, adapter, options.examples)
            repeats.append(found | run_in_turn({"hf": hf}))
    return {"parameters": parameters, **combine_repeats(repeats)}


def run_in_turn(tasks: dict[str, Callable[[], dict[str, Any]]], is_reversed: bool = False) -> dict[str, dict[str, Any]]:
    """What each task returns, one after the other on one core."""
    names = list(tasks)[::-1] if is_reversed else list(tasks)
    found = {name: run_side_by_side({name: tasks[name]}, 0)[name] for name in names}
    return {name: found[name] for name in tasks}


def combine_repeats(repeats: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The median of each speed by source, and ours in multiples of each other source's; the reason of what failed."""
    combined: dict[str, Any] = {}
    for source in repeats[0]:
        speeds = [repeat[source] for repeat in repeats]
        failed = next((speed for speed in speeds if "failed" in speed), None)
        combined[source] = failed or {what: statistics.median(speed[what] for speed in speeds) for what in speeds[0]}
        if source != "ours" and not failed:
            combined[f"ours to {source}"] = {
                what: statistics.geometric_mean(repeat["ours"][what] / repeat[source][what] for repeat in repeats)
                for what in speeds[0]
            }
    return combined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="DIR", help="another checkout")
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--examples", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--hf", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hf:
        name, model, adapter = options.hf
        print(json.dumps(measure_hf(name, Path(model), Path(adapter), options.examples)))
        return
    sources = {"ours": ROOT}
    if options.source:
        sources[describe_commit(options.source)] = options.source.resolve()
    rows = json.loads(options.output.read_text())["rows"] if len(options.only) < len(ARCHITECTURES) else {}
    for name in options.only:
        rows[name] = measure(name, sources, options)
        for source, speeds in rows[name].items():
            print(f"{name:14} {source:16} {json.dumps(speeds)}", flush=True)
    result = {"machine": described(), "precision": PRECISION, "ours": describe_commit(ROOT), "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
