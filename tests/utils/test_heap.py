"""Freed memory stays with the process within the block, and goes back to the system at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource
import numpy as np
from training_lens.utils.devices import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [np.ones(2**20, dtype=np.uint8) for _ in range(200)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

with keep_freed_memory():
    with keep_freed_memory():
        faults()
    again, kept = faults(), resident()
print(again, kept, resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone keeps and gives back")
def test_what_is_freed_is_taken_again_without_the_system_and_given_back_at_the_end(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=tmp_path)
    again, kept, after = map(int, done.stdout.split())  # pages, MB, MB
    assert again < 1000  # 200 MB are 51,200 pages
    assert kept > after + 150
