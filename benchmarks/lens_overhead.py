"""What the lens costs while it trains: steps with and without it in turn, and the memory of each in its own process.

    python benchmarks/lens_overhead.py [--steps 64] [--output benchmarks/results/lens_overhead.json]

Llamas of random weights, LoRA of rank 16 on every linear layer, GSM8K rows. The main model is the 125 M shape of
train_speed.py in bfloat16 (30 layers, 210 adapted modules); the others, for scaling, are 256 wide, in float32, have 2
to 60 layers, and take a quarter of the steps (`--layers` measures some of them alone, and leaves the others' results in
the file). Two trainers on the same rows take the first steps of a run of 934 in turn, one under the lens as it comes.
Written: milliseconds of a step (median) each way and their ratio; the lens's own seconds as a share of the steps'
seconds (all of them: spectra, probe, snapshots, writing; the start and the end apart); peak memory of a run with and
without, in processes of their own; bytes on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from training_jobs import write_model

from training_lens import TrainingConfig
from training_lens.runs.run_folder import RunFolder
from training_lens.training.adapted_base import build_trainer
from training_lens.training.lens_callback import CaptureCallback, build_capture_callback
from training_lens.training.loop.checkpoint_manager import CheckpointManager
from training_lens.training.loop.trainer import Trainer
from training_lens.training.run import TrainingWrapper
from training_lens.utils.devices import peak_bytes

MAIN = 30
LAYERS = (2, 6, 24, MAIN, 60)
PEAKS = 3  # processes each way


def write_layers(folder: Path, layers: int, tokenizer: Path) -> int:
    """A narrow Llama of random weights; its number of parameters."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256, intermediate_size=688, num_attention_heads=4, num_hidden_layers=layers,
            vocab_size=50257, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=50256,
            eos_token_id=50256,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def written(folder: Path, layers: int, shared: Path) -> int:
    """The model of so many layers; its number of parameters."""
    if layers == MAIN:
        return write_model(folder, "125m", shared / "tokenizers/phi3")
    return write_layers(folder, layers, shared / "tokenizers/gpt2")


def configured(model: Path, shared: Path, folder: Path) -> TrainingConfig:
    """A run of 934 steps, of which the first are taken: what comes at intervals comes as in a real run."""
    stored = json.loads((model / "config.json").read_text())
    precision = "bf16" if stored["num_hidden_layers"] == MAIN else "fp32"
    return TrainingConfig.model_validate(
        {
            "model": {"id": str(model), "seq_len": 512},
            "data": {"train": [str(shared / "data/gsm8k/train.jsonl")]},
            "training": {"epochs": 1, "batch_size": 8, "lr": 1e-4, "precision": precision},
            "output": {"base_output_dir": str(folder)},
        }
    )


def assembled(config: TrainingConfig, folder: Path, lens: bool) -> tuple[Trainer, CaptureCallback | None]:
    """A trainer of the config, under the lens or not, ready for its first step."""
    from training_lens.models.factory import load_model

    plan = TrainingWrapper(config).plan()
    run = RunFolder(folder).create()
    callback = build_capture_callback(plan, run.lens) if lens else None
    model = load_model(plan.config.model, plan.processes.device, plan.precision)
    manager = CheckpointManager(run.checkpoints, plan.fingerprint)
    return build_trainer(plan, model, manager, (callback,) if callback else ()), callback


def side_by_side(model: Path, shared: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Steps of two trainers in turn: who goes first alternates."""
    config = configured(model, shared, folder)
    plain, _ = assembled(config, folder / "plain", lens=False)
    watched, lens = assembled(config, folder / "lens", lens=True)
    assert lens is not None
    watched.notify_callbacks("on_train_start")
    started = lens.capture_seconds
    taken: dict[str, list[float]] = {"plain": [], "lens": []}
    for plan in islice(plain.schedule.iterate_steps(), steps):
        order = [("plain", plain), ("lens", watched)]
        for name, trainer in order if plan.number % 2 else reversed(order):
            begun = time.perf_counter()
            report = trainer.train_step(plan)
            trainer.state = trainer.state.count_step(report)
            trainer.notify_callbacks("on_step_end", report)
            taken[name].append(time.perf_counter() - begun)
    during = lens.capture_seconds - started
    watched.notify_callbacks("on_train_end")
    files = [p for p in (folder / "lens" / "lens").rglob("*") if p.is_file()]
    ratios = [b / a for a, b in zip(taken["plain"], taken["lens"], strict=True)]
    return {
        "steps": len(ratios),
        "step_ms_plain": round(1000 * statistics.median(taken["plain"]), 1),
        "step_ms_lens": round(1000 * statistics.median(taken["lens"]), 1),
        "median_ratio": round(statistics.median(ratios), 4),
        "total_ratio": round(sum(taken["lens"]) / sum(taken["plain"]), 4),
        "lens_share_of_steps": round(during / (sum(taken["lens"]) - during), 4),
        "lens_ms_per_step": round(1000 * during / len(ratios), 2),
        "start_seconds": round(started, 3),
        "end_seconds": round(lens.capture_seconds - started - during, 3),
        "seconds_by_part": {name: round(s, 4) for name, s in sorted(lens.lens.seconds.items())},
        "bytes_on_disk": sum(p.stat().st_size for p in files),
    }


def peak_of(model: Path, shared: Path, folder: Path, lens: bool, **environment: str) -> int:
    """The most memory of a process of its own that trains four steps, in bytes, as that process reads it."""
    command = [sys.executable, __file__, "--peak-of", str(model), str(folder), str(int(lens)), "--shared", str(shared)]
    environment = {**os.environ, **environment}
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)


def peaks(model: Path, shared: Path, folder: Path) -> dict[str, Any]:
    """Peaks of memory in use, and of memory that the process holds.

    In use: glibc is told to give every freed block of over 1 MB back, so that the peak is what was needed at once.
    Held, as it comes: freed blocks stay, and how they are used again differs from run to run, by 15 % without the lens;
    several processes each way, in turn.
    """
    used = [peak_of(model, shared, folder / "used", lens, MALLOC_MMAP_THRESHOLD_=str(2**20)) for lens in (False, True)]
    held: dict[bool, list[int]] = {False: [], True: []}
    for turn in range(PEAKS):
        for lens in held:
            held[lens].append(peak_of(model, shared, folder / str(turn), lens))
    return {
        "peak_bytes_plain": used[0],
        "peak_bytes_lens": used[1],
        "peak_ratio": round(used[1] / used[0], 4),
        "held_bytes_plain": held[False],
        "held_bytes_lens": held[True],
        "held_ratio": round(statistics.median(held[True]) / statistics.median(held[False]), 4),
    }


def train_some(model: Path, shared: Path, folder: Path, lens: bool) -> None:
    """Four steps, whole: what `peak_of` measures."""
    trainer, _ = assembled(configured(model, shared, folder), folder / f"memory-{int(lens)}", lens)
    trainer.notify_callbacks("on_train_start")
    for plan in islice(trainer.schedule.iterate_steps(), 4):
        report = trainer.train_step(plan)
        trainer.state = trainer.state.count_step(report)
        trainer.notify_callbacks("on_step_end", report)
    trainer.notify_callbacks("on_train_end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lens_overhead.json"))
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--no-peaks", action="store_true", help="leave the memory's results in the file")
    parser.add_argument("--layers", type=int, nargs="*", default=LAYERS)
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        model, folder, lens = args.peak_of
        train_some(Path(model), args.shared, Path(folder), lens == "1")
        print(peak_bytes(torch.device("cpu")))
        return
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results["machine"] = {"cores": os.cpu_count(), "platform": platform.machine(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layers in args.layers:
            model = folder / f"model-{layers}"
            parameters = written(model, layers, args.shared)
            result = results.get(f"{layers}_layers", {}) | {"parameters": parameters, "modules": 7 * layers}
            steps = args.steps if layers == MAIN else args.steps // 4
            result |= side_by_side(model, args.shared, folder / f"run-{layers}", steps)
            if layers == MAIN and not args.no_peaks:
                result |= peaks(model, args.shared, folder / f"peak-{layers}")
            results[f"{layers}_layers"] = result
            print(f"{layers} layers: {json.dumps(result)}", file=sys.stderr)
            args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
