"""Checks of this machine's GPU: results, drills and speed of Training Lens there, in one table and one JSON file.

    python tools/gpu_check.py [--output gpu_check.json] [--only NAME ...]
    python tools/gpu_check.py --device cpu --small

Models have random weights and the embedded tokenizer, so no network and no other file is needed; all that is written
besides the JSON lies in a temporary folder. Compared are models of 4 layers and width 1024, timed is a Llama of 1 B
parameters; with --small, both have 2 layers and width 64. A check that fails leaves the others running, and makes the
exit code 1; one that cannot run on this device says why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # HF Trainer would take all of several

import torch
from gpu_checks.drills import force_infinity, resume_after_signal, run_command_line, run_out_of_memory, train_in_4_bits
from gpu_checks.kernels import compare_kernels, read_signatures
from gpu_checks.models import Found, Settings, isolate
from gpu_checks.speed import compare_answers, count_synchronizations, measure_training

import training_lens
from training_lens.utils.devices import device_name
from training_lens.utils.logging import quiet_libraries
from training_lens.utils.machine import PACKAGES


def read_versions(settings: Settings) -> Found:
    """Versions of packages, system and device."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    versions |= {name: metadata.version(name) for name in ("bitsandbytes", "triton") if find_spec(name)}
    found: Found = {
        "training_lens": training_lens.__version__, "packages": versions, "python": platform.python_version(),
        "platform": platform.platform(), "cores": os.cpu_count(), "device": device_name(settings.device),
        "cuda": torch.version.cuda, "hip": torch.version.hip,
    }  # fmt: skip
    if settings.device.type == "cuda":
        properties = torch.cuda.get_device_properties(settings.device)
        found |= {"capability": [properties.major, properties.minor], "memory_bytes": properties.total_memory}
    return {**found, "summary": f"{found['device']}, torch {torch.__version__}, peft {versions['peft']}"}


CHECKS: dict[str, Callable[[Settings], Found]] = {
    "versions": read_versions,
    "signatures": read_signatures,
    "kernels": compare_kernels,
    "synchronizations": count_synchronizations,
    "command_line": run_command_line,
    "signal": resume_after_signal,
    "infinity": force_infinity,
    "memory": run_out_of_memory,
    "training_speed": measure_training,
    "answers": compare_answers,
    "4bit": train_in_4_bits,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--small", action="store_true", help="small shapes, as a CPU can compute them")
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME", help=", ".join(CHECKS)
    )
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; to try the script itself: --device cpu --small")
    quiet_libraries()
    report: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(torch.device(options.device), options.small, Path(folder))
        for name in options.only:
            report[name] = found = isolate(partial(CHECKS[name], settings))
            line = found.get("error") or found.get("why") or found["summary"]
            print(f"{name:<18}{found['status']:<9}{found['seconds']:>7.1f} s  {line}", flush=True)
            content = {"device": options.device, "small": options.small, "checks": report}
            options.output.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    sys.exit(any(found["status"] == "failed" for found in report.values()))


if __name__ == "__main__":
    main()
