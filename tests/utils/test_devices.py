"""Devices that are not there are refused; the peak is the program's own, and never below what it holds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from training_lens.errors import ConfigurationError
from training_lens.utils.devices import get_device, peak_bytes, reset_process_peak

CPU = torch.device("cpu")


def test_the_peak_covers_what_is_held() -> None:
    before = peak_bytes(CPU)
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peak_bytes(CPU) >= before and peak_bytes(CPU) >= held.numel()


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
