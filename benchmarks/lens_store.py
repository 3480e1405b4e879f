"""The lens's store over a long run: bytes on disk, seconds while training, and what reading all of it takes.

    python benchmarks/lens_store.py [--steps 100000] [--output benchmarks/results/lens_store.json]

Random captures of 224 modules (32 layers of q, k, v, o, gate, up and down), every step: 7 measures of weights, 5 of
gradients, 4 of the loss; every 1,000 steps spectra of 16 values. They go through the LensWriter with the default
bounds; series are read in a process of their own. Writes one JSON object. `add` and `flush` are the store's seconds;
making the random numbers is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from training_lens.config.lens_section import LensSection
from training_lens.core.store import LensStore, LensWriter
from training_lens.core.types import Captured, DataType, LensManifest, ModuleRecord
from training_lens.utils.devices import device_name, peak_bytes

CPU = torch.device("cpu")
KINDS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "gate_proj", "up": "up_proj"}
KINDS["down"] = "down_proj"
MODULES = tuple(
    ModuleRecord(
        f"model.layers.{layer}.{'self_attn' if kind in 'qkvo' else 'mlp'}.{name}", layer, kind, 16, 4096, 4096, 2
    )
    for layer in range(32)
    for kind, name in KINDS.items()
)
NAMES = tuple(module.name for module in MODULES)
MEASURES = {
    DataType.ADAPTER_WEIGHTS: ("a_norm", "b_norm", "update_norm", "relative_update", "step_norm", "cosine", "drift"),
    DataType.ADAPTER_GRADIENTS: ("a_gradient", "b_gradient", "gradient_norm", "gradient_cosine", "share"),
    DataType.LOSS: ("loss", "gradient_norm", "learning_rate", "tokens"),
}
SPECTRA_EVERY = 1000


def captures(step: int) -> dict[str, Captured]:
    """What the collectors of one step would give."""
    made = {}
    for table, measures in MEASURES.items():
        rows = ("run",) if table == DataType.LOSS else NAMES
        values = torch.randn(len(measures), len(rows)).mul_(0.3).exp_()
        made[str(table)] = Captured(dict(zip(measures, values, strict=True)), rows=rows)
    if step % SPECTRA_EVERY == 0:
        spectra = torch.rand(len(NAMES), 16).sort(descending=True).values
        made["spectra"] = Captured(vectors={"singular_values": list(spectra)}, rows=NAMES)
    return made


def simulate(folder: Path, steps: int) -> dict[str, Any]:
    """Write the captures of a run of `steps` steps to `folder`; what that took."""
    torch.manual_seed(0)
    tables = {**{str(kind): kind for kind in MEASURES}, "spectra": DataType.ADAPTER_WEIGHTS}
    writer = LensWriter(folder, LensManifest(MODULES, tables=tables, settings={"total_steps": steps}), LensSection())
    seconds = {"add": 0.0, "flush": 0.0, "longest_flush": 0.0}
    adds = 0
    for step in range(1, steps + 1):
        made = captures(step)
        started = time.perf_counter()
        for table, captured in made.items():
            writer.add(table, step, captured)
        added = time.perf_counter()
        writer.flush() if step == steps else writer.flush_if_due()
        flushed = time.perf_counter() - added
        seconds["add"] += added - started
        seconds["flush"] += flushed
        seconds["longest_flush"] = max(seconds["longest_flush"], flushed)
        adds += len(made)
    writer.close()
    return {
        "steps": steps,
        "bytes_on_disk": writer.size,
        "bytes_written": writer.bytes_written,
        "files": sum(1 for path in folder.rglob("*") if path.is_file()),
        "add_seconds": round(seconds["add"], 2),
        "add_microseconds_per_table": round(seconds["add"] / adds * 1e6, 1),
        "flush_seconds": round(seconds["flush"], 2),
        "longest_flush_seconds": round(seconds["longest_flush"], 2),
        "milliseconds_per_step": round((seconds["add"] + seconds["flush"]) / steps * 1e3, 3),
    }


def read(folder: Path) -> dict[str, Any]:
    """Read every series of `folder`; what that took. The peak is this process's."""
    before = peak_bytes(CPU)
    started = time.perf_counter()
    store = LensStore(folder)
    opened = time.perf_counter()
    series = [store.series(str(table), measure) for table, measures in MEASURES.items() for measure in measures]
    store.vectors("spectra", "singular_values")
    done = time.perf_counter()
    return {
        "open_milliseconds": round((opened - started) * 1e3, 1),
        "series": len(series),
        "read_seconds": round(done - opened, 2),
        "steps_left": {str(t): len(store.series(str(t), measures[0]).steps) for t, measures in MEASURES.items()},
        "peak_bytes": peak_bytes(CPU),
        "peak_bytes_before_reading": before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lens_store.json"))
    parser.add_argument("--read", type=Path, help="only read the captures in this folder")
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read)))
        return
    with tempfile.TemporaryDirectory() as name:
        whole, short = Path(name) / "whole", Path(name) / "short"
        unthinned = simulate(short, 1000)["bytes_on_disk"] / 1000 / len(MODULES)
        written = simulate(whole, args.steps)
        call = [sys.executable, __file__, "--read", str(whole)]
        reading = json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout)
    result = {
        "machine": device_name(CPU),
        "modules": len(MODULES),
        "measures_per_module": sum(len(m) for table, m in MEASURES.items() if table != DataType.LOSS),
        "bytes_per_module_and_step_before_thinning": round(unthinned, 1),
        "writing": written,
        "reading": reading,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
