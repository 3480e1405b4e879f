"""The same LoRA training by Training Lens and by what one would take instead, in turn, each in a process of its own.

    make peers                                                        (once: virtual environments of the peers)
    python benchmarks/train_speed.py [--only gsm8k t0] [--modes ours hf trl] [--rows 32] [--repeats 3]
    python benchmarks/train_speed.py --only fixed --lengths 1024 4096 --shape 1b          (for a GPU)
    python benchmarks/train_speed.py --grow [length model rank batch]           (how our own cost grows)

A Llama of random weights (the 125 M parameters of SmolLM2-135M's shape, the vocabulary of Phi-3), bf16, LoRA of rank 16
on every linear layer, AdamW at 2e-4 falling to 0, batch 8, one pass over the rows; all get the tokens that Training
Lens makes of them, so all train on the same tokens. `gsm8k` are rows of like length, `t0` has a long tail.

Printed and written: useful tokens (no padding) per second, median over the repeats; ratios of ours to each; the share
that 4 x parameters x useful tokens is of the machine's own bf16 matrix-product rate, measured before and after each
training (two seconds of products each time: the machine's speed drifts), for ours also behind the first two steps; peak
memory once the model is loaded; the mean of the steps' losses. A speed counts at equal loss: a peer whose loss is
more than 2 % from ours is named in `other_loss`. A mode that is not installed, or fails, is said to be so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import described, matmul_flops
from train_ours import write_tokens
from training_growth import AXES, grow
from training_jobs import (
    OUR_MODES,
    PEER_MODES,
    SHAPES,
    Job,
    long_pairs,
    python_of,
    read_pairs,
    run_job,
    write_model,
    write_pairs,
)

WITH_LENS, WITHOUT = ["ours", "ours_lens", "hf", "hf_group", "trl"], ["ours", "hf", "hf_group"]
DEFAULT_MODES = {"gsm8k": WITH_LENS, "t0": WITHOUT, "fixed": ["ours", "hf", "unsloth"]}
SOURCES = {"gsm8k": "data/gsm8k/train.jsonl", "t0": "data/t0_per_template/*.jsonl"}
UNSTEADY = 2  # first steps, in which kernels are prepared and memory is first taken
TOLERANCE = 0.02  # of the loss: beyond it two trainings did not do the same


def rounds(modes: Sequence[str], job: Job, folder: Path, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """What each mode measured, time after time; one that fails or is not there is tried once."""
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    before = matmul_flops()
    for turn in range(repeats):
        for mode in modes:
            if any("failed" in result for result in found[mode]):
                continue
            if not python_of(mode).exists():
                found[mode].append({"failed": "not installed: make peers"})
                continue
            result = run_job(replace(job, mode=mode, output=str(folder / f"{mode}-{turn}")), folder)
            after = matmul_flops()
            found[mode].append({**result, "matmul_flops": (before + after) / 2})
            before = after
            print(f"{mode}: {json.dumps(result)}", file=sys.stderr)
    return found


def summed_up(found: dict[str, list[dict[str, Any]]], tokens: int, parameters: int) -> dict[str, dict[str, Any]]:
    """Each mode's medians; modes that failed say why."""
    return {mode: _median(results, tokens, parameters) for mode, results in found.items()}


def _median(results: list[dict[str, Any]], tokens: int, parameters: int) -> dict[str, Any]:
    failed = next((result for result in results if "failed" in result), None)
    if failed:
        return failed
    seconds = [result["seconds"] for result in results]
    shares = [4 * parameters * tokens / result["seconds"] / result["matmul_flops"] for result in results]
    # Of runs that are longer than those: two steps leave nothing behind them.
    steady = [_steady_share(r, parameters) for r in results if len(r.get("step_seconds", ())) > UNSTEADY]
    return {
        "useful_tokens_per_second": round(tokens / statistics.median(seconds), 1),
        "share_of_matmul_rate": round(statistics.median(shares), 4),
        **({"share_behind_two_steps": round(statistics.median(steady), 4)} if steady else {}),
        "matmul_flops": [round(result["matmul_flops"]) for result in results],
        "peak_bytes": int(statistics.median(result["peak_bytes"] for result in results)),
        "loss": round(statistics.fmean(result["loss"] for result in results), 4),
        "seconds": [round(s, 2) for s in seconds],
    }


def _steady_share(result: dict[str, Any], parameters: int) -> float:
    """The share behind the first two steps."""
    tokens, seconds = (sum(result[key][UNSTEADY:]) for key in ("step_tokens", "step_seconds"))
    return float(4 * parameters * tokens / seconds / result["matmul_flops"])


def compared(modes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours over each peer: speed and peak memory; and the modes of which the loss is another."""
    ours = modes.get("ours", {"failed": "not asked for"})
    if "failed" in ours:
        return {}
    others = {m: r for m, r in modes.items() if m != "ours" and "failed" not in r}
    return {
        "speed_of_ours": {m: round(_ratio(ours, r, "useful_tokens_per_second"), 3) for m, r in others.items()},
        "memory_of_ours": {m: round(_ratio(ours, r, "peak_bytes"), 3) for m, r in others.items()},
        "other_loss": [m for m, r in others.items() if abs(_ratio(r, ours, "loss") - 1) > TOLERANCE],
    }


def _ratio(a: dict[str, Any], b: dict[str, Any], key: str) -> float:
    return float(a[key] / b[key])


def measured(name: str, pairs: list[tuple[str, str]], args: argparse.Namespace, job: Job, folder: Path) -> None:
    """Train on these rows in every mode, and put the result into the file under `name`."""
    folder.mkdir()
    job = replace(job, rows=str(folder / "rows.jsonl"), tokens=str(folder / "tokens.jsonl"))
    write_pairs(pairs, Path(job.rows))
    counts = write_tokens(vars(replace(job, output=str(folder / "tokens"))), Path(job.tokens))
    found = rounds(args.modes or DEFAULT_MODES[name.split("_")[0]], job, folder, args.repeats)
    modes = summed_up(found, counts["tokens"], args.parameters)
    result = {**counts, "shape": args.shape, "batch": job.batch, "parameters": args.parameters}
    result |= {"repeats": args.repeats, "modes": modes, **compared(modes)}
    _write(args.output, name, result)
    print(json.dumps({name: result}, indent=2))


def _write(path: Path, name: str, result: dict[str, Any]) -> None:
    results = json.loads(path.read_text()) if path.is_file() else {}
    results |= {"machine": described(), name: result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(DEFAULT_MODES), default=list(SOURCES))
    parser.add_argument("--modes", nargs="+", choices=[*OUR_MODES, *PEER_MODES], help="default: by the rows")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shape", choices=list(SHAPES), default="125m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="of `fixed` rows, tokens")
    parser.add_argument("--grow", nargs="*", choices=list(AXES), help="measure ours alone along these (all)")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/train_speed.json"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.shared, args.output = args.shared.resolve(), args.output.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = args.shared / "tokenizers/phi3"
        if args.grow is not None:
            _write(args.output, "growth", grow(args.grow or list(AXES), tokenizer, folder))
            return
        args.parameters = write_model(folder / "model", args.shape, tokenizer)
        job = Job("ours", str(folder / "model"), "", "", "", batch=args.batch)
        for source in args.only:
            if source == "fixed":
                for length in args.lengths:
                    exact = replace(job, seq_len=length)
                    measured(f"fixed_{length}", long_pairs(length, args.rows), args, exact, folder / f"fixed-{length}")
            else:
                pairs = read_pairs(str(args.shared / SOURCES[source]), args.rows)
                measured(source, pairs, args, job, folder / source)


if __name__ == "__main__":
    main()
