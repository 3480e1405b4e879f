"""Checks of this machine for training: versions, devices, disk space, permissions, compiler, packages."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from training_lens.errors import TrainingLensError
from training_lens.utils.compiling import CompilationError, cache_folder, find_compiler
from training_lens.utils.devices import available_bytes, device_name, get_device
from training_lens.utils.files import require_writable
from training_lens.utils.formatting import format_size
from training_lens.utils.hub_access import require_hub

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "pyarrow", "numpy")
OPTIONAL = {  # extra of Training Lens -> the module it installs
    **{name: name for name in ("wandb", "mlflow", "trackio", "bitsandbytes")},
    "s3": "s3fs",
    "gcs": "gcsfs",
    "azure": "adlfs",
    "ssh": "sshfs",
    "notebook": "ipykernel",
    "eval": "lm_eval",
}
LITTLE_BYTES = 2**30  # of disk, about a short run with checkpoints


@dataclass(frozen=True)
class MachineCheck:
    """One check: whether it passed, what was found, and what to do otherwise."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def check_machine(base_output_dir: str) -> Iterator[MachineCheck]:
    """The checks of this machine, with `base_output_dir` for runs, one by one. A missing optional package passes."""
    yield MachineCheck("python", True, f"{sys.version.split()[0]} on {platform.platform()}")
    yield MachineCheck("packages", True, ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES))
    device = get_device()
    free = available_bytes(device)
    yield MachineCheck(
        "device", True, f"{device_name(device)} ({device}), {format_size(free) if free else 'unknown'} free"
    )
    base, temporary = Path(base_output_dir), Path(tempfile.gettempdir())
    for name, folder in {"runs": base, "temporary files": temporary, "compiled kernels": cache_folder()}.items():
        yield _check_folder(name, folder)
    try:
        compiler = find_compiler()[0]
    except CompilationError as error:
        compiler = f"{error}: kernels are torch's, and slower"
    yield MachineCheck("C compiler", True, compiler)
    there = {extra for extra, module in OPTIONAL.items() if find_spec(module)}
    absent = sorted(OPTIONAL.keys() - there)
    yield MachineCheck(
        "optional packages", True, f"here: {', '.join(sorted(there)) or 'none'}; not: {', '.join(absent)}"
    )
    yield MachineCheck("unsloth", True, describe_unsloth(device.type))
    try:
        require_hub("hub", TrainingLensError)
        hub = "answers, or HF_HUB_OFFLINE is set"
    except TrainingLensError as error:
        hub = f"no answer ({error.__cause__}): local models and data alone"
    yield MachineCheck("Hugging Face hub", True, hub)


def describe_unsloth(device_type: str) -> str:
    """Whether model.backend=unsloth can train on this kind of device here; unsloth is not imported."""
    if not is_unsloth_installed():
        return "not installed: model.backend=unsloth is refused"
    version = metadata.version("unsloth")
    return version if device_type == "cuda" else f"{version}, and no CUDA GPU: model.backend=unsloth is refused"


def is_unsloth_installed() -> bool:
    """Whether unsloth and the package that it needs are there; neither is imported."""
    return all(find_spec(name) is not None for name in ("unsloth", "unsloth_zoo"))


def _check_folder(name: str, folder: Path) -> MachineCheck:
    try:
        require_writable(folder, name)
    except TrainingLensError as error:
        return MachineCheck(name, False, str(error), "Give a folder that you may write.")
    free = shutil.disk_usage(folder).free
    remedy = "" if free >= LITTLE_BYTES else "Free some space."
    return MachineCheck(name, free >= LITTLE_BYTES, f"{folder} can be written, {format_size(free)} free", remedy)
