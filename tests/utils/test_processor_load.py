"""Other programs' work is told from one's own."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from training_lens.utils.processor_load import OtherPrograms

SECONDS = 1.0
BUSY = (
    f"import time\nuntil = time.monotonic() + {SECONDS + 30}\nprint(flush=True)\nwhile time.monotonic() < until: pass"
)


def test_a_busy_process_is_seen_and_own_work_is_not() -> None:
    cores = psutil.cpu_count() or 1
    alone, own = OtherPrograms(), time.process_time()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        pass
    own = (time.process_time() - own) / (SECONDS * cores)
    assert own > 0 and alone.share() <= 1 - own + 0.1
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            beside, used = OtherPrograms(), psutil.Process(process.pid)
            before = sum(used.cpu_times()[:2])
            time.sleep(SECONDS)
            share = beside.share()
            taken = (sum(used.cpu_times()[:2]) - before) / (SECONDS * cores)
        finally:
            process.kill()
    assert share >= 0.8 * taken > 0  # what that process took, whatever else runs here
