"""Devices that are not there are refused, what one can do is asked of it, copies are safe, and the peak is own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import training_lens
from training_lens.errors import ConfigurationError
from training_lens.utils.devices import get_device, peak_bytes, reset_process_peak, resolve_precision

CPU = torch.device("cpu")


def test_the_peak_covers_what_is_held() -> None:
    before = peak_bytes(CPU)
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peak_bytes(CPU) >= before and peak_bytes(CPU) >= held.numel()


@pytest.mark.slow
def test_the_peak_is_not_that_of_the_program_that_started_it() -> None:
    held = torch.ones(2**30, dtype=torch.uint8)
    code = "import torch; from training_lens.utils.devices import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) < held.numel()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a process's peak")
def test_a_process_peak_can_be_counted_anew() -> None:
    held = torch.ones(256 * 2**20, dtype=torch.uint8)
    high = peak_bytes(CPU)
    del held
    assert reset_process_peak()
    assert peak_bytes(CPU) < high - 200 * 2**20


@pytest.mark.parametrize("name", ["cuda:99", "cuda:x", "warp", "cpu:3", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"model.device: '{name}' is not available here; available: .*cpu"):
        get_device(name)


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 6), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
def test_the_chosen_gpu_computes_in_bf16_only_where_it_has_it_itself(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    """V100 (7.0) and T4 (7.5) emulate it, which torch counts as support."""
    asked = []

    def get_capability(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", get_capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_precision("auto", torch.device("cuda:1")) == precision
    assert asked == [torch.device("cuda:1")]


def test_one_place_copies_without_waiting() -> None:
    """Anywhere else a pageable source could be freed, or a result be read, before the copy is done."""
    root = Path(training_lens.__file__).parent
    places = [p.name for p in root.rglob("*.py") if re.search(r"non_blocking", p.read_text())]
    assert places == ["devices.py"]
    text = (root / "utils/devices.py").read_text()
    assert text.count("non_blocking=True") == 1 and "pin_memory()" in text
