"""The lens over a long run: bytes on disk, seconds while training, and what reading it and its report take.

    python benchmarks/lens_store.py [--steps 100000] [--output benchmarks/results/lens_store.json]

Random captures of 224 modules (32 layers of q, k, v, o, gate, up and down), in the built-in tables: every step 5
measures of weights, 5 of gradients, 2 of the optimizer and 8 of the loss; every 1,000 steps spectra of 16 values, the
probe set and a validation. They go through the LensWriter with the default bounds. All series are read, and the
standard report (technical, HTML) is made, each in a process of its own. Writes one JSON object. `add` and `flush` are
the store's seconds; making the random numbers is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training_lens.config.lens_section import LensSection
from training_lens.core import table_names as tables
from training_lens.core.lens_store import LensStore
from training_lens.core.lens_writer import LensWriter
from training_lens.core.types import RUN, Captured, DataType, LensManifest, ModuleRecord
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
LAYERS = tuple(f"layers.{layer}" for layer in range(32))
EVERY_STEP = {
    tables.WEIGHTS: ("norm_a", "norm_b", "norm_update", "norm_step", "balance"),
    tables.GRADIENTS: ("norm_a", "norm_b", "cosine_previous", "cosine_mean", "self_check"),
    tables.OPTIMIZER: ("update_rms_a", "update_rms_b"),
    tables.LOSS: tuple(tables.MEASURES[tables.LOSS]),
}
SELDOM = {
    tables.SPECTRA: ("effective_rank", "stable_rank", "energy_rank"),
    tables.ACTIVATIONS: ("rms", "drift"),
    tables.DIVERGENCE: ("kl", "loss", "base_loss"),
    tables.EVALUATION: ("loss",),
}
SELDOM_EVERY = 1000
ROWS = {
    **dict.fromkeys((tables.LOSS, tables.DIVERGENCE, tables.EVALUATION), (RUN,)),
    tables.ACTIVATIONS: LAYERS,
}
DATA_TYPES = {
    tables.GRADIENTS: DataType.ADAPTER_GRADIENTS,
    tables.OPTIMIZER: DataType.OPTIMIZER_STATE,
    tables.ACTIVATIONS: DataType.ACTIVATIONS,
    **dict.fromkeys((tables.LOSS, tables.DIVERGENCE, tables.EVALUATION), DataType.LOSS),
    **dict.fromkeys((tables.WEIGHTS, tables.BASE, tables.SPECTRA), DataType.ADAPTER_WEIGHTS),
}


def captures(step: int) -> dict[str, Captured]:
    """What the collectors of one step would give."""
    if step == 0:
        return {tables.BASE: Captured({"norm": torch.full((len(NAMES),), 64.0)}, rows=NAMES)}
    seldom = step % SELDOM_EVERY == 0
    made = {table: _random(table, measures) for table, measures in {**EVERY_STEP, **(SELDOM if seldom else {})}.items()}
    if seldom:
        spectra = torch.rand(len(NAMES), 16).sort(descending=True).values
        drawn = made[tables.SPECTRA]
        made[tables.SPECTRA] = Captured(drawn.scalars, {"singular_values": list(spectra)}, rows=NAMES)
    return made


def _random(table: str, measures: Sequence[str]) -> Captured:
    rows = ROWS.get(table, NAMES)
    values = torch.randn(len(measures), len(rows)).mul_(0.3).exp_()
    return Captured(dict(zip(measures, values, strict=True)), rows=rows)


def simulate(folder: Path, steps: int) -> dict[str, Any]:
    """Write the captures of a run of `steps` steps to `folder`; what that took."""
    torch.manual_seed(0)
    settings = {"total_steps": steps, "steps_per_epoch": steps / 4}
    writer = LensWriter(folder, LensManifest(MODULES, tables=DATA_TYPES, settings=settings), LensSection())
    seconds = {"add": 0.0, "flush": 0.0, "longest_flush": 0.0}
    adds = 0
    for step in range(steps + 1):
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


def read(run: Path) -> dict[str, Any]:
    """Read every series of the run's captures; what that took. The peak is this process's."""
    before = peak_bytes(CPU)
    started = time.perf_counter()
    store = LensStore(run / "lens")
    opened = time.perf_counter()
    series = [store.series(table, measure) for table, measures in EVERY_STEP.items() for measure in measures]
    store.vectors(tables.SPECTRA, "singular_values")
    done = time.perf_counter()
    return {
        "open_milliseconds": round((opened - started) * 1e3, 1),
        "series": len(series),
        "read_seconds": round(done - opened, 2),
        "steps_left": {table: len(store.series(table, measures[0]).steps) for table, measures in EVERY_STEP.items()},
        "peak_bytes": peak_bytes(CPU),
        "peak_bytes_before_reading": before,
    }


def report(run: Path) -> dict[str, Any]:
    """Analyse the run and write its standard report; what that took, libraries that it loads included."""
    before = peak_bytes(CPU)
    started = time.perf_counter()
    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
    from training_lens.analysis.reports.standard import StandardReports

    analysis = CheckpointAnalyzer(run).analyze()
    analysed = time.perf_counter()
    path = StandardReports(analysis).write(run / "reports", "technical", "html")
    done = time.perf_counter()
    return {
        "analyse_seconds": round(analysed - started, 2),
        "write_seconds": round(done - analysed, 2),
        "seconds": round(done - started, 2),
        "html_bytes": path.stat().st_size,
        "findings": len(analysis.findings),
        "peak_bytes": peak_bytes(CPU),
        "peak_bytes_before": before,
    }


WAYS = {"read": read, "report": report}


def in_a_process(way: str, run: Path) -> dict[str, Any]:
    """What `read` or `report` gives in a fresh process."""
    call = [sys.executable, __file__, "--way", way, "--run", str(run)]
    found: dict[str, Any] = json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lens_store.json"))
    parser.add_argument("--way", choices=WAYS, help="only this, of the run in --run; prints what it took")
    parser.add_argument("--run", type=Path, help="a folder with captures in its folder lens")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(WAYS[args.way](args.run)))
        return
    with tempfile.TemporaryDirectory() as name:
        whole, short = Path(name) / "whole", Path(name) / "short"
        unthinned = simulate(short / "lens", 1000)["bytes_on_disk"] / 1000 / len(MODULES)
        written = simulate(whole / "lens", args.steps)
        taken = {way: in_a_process(way, whole) for way in WAYS}
    result = {
        "machine": device_name(CPU),
        "modules": len(MODULES),
        "measures_per_module": sum(len(m) for table, m in EVERY_STEP.items() if table != tables.LOSS),
        "bytes_per_module_and_step_before_thinning": round(unthinned, 1),
        "writing": written,
        "reading": taken["read"],
        "standard_report": taken["report"],
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
