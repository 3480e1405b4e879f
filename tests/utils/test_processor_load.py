"""Other programs' work is told from one's own, and threads make room for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil
import pytest

from training_lens.utils.processor_load import SHORT_SPIN, SPIN_COUNT, OtherPrograms, share_busy_cores

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


@pytest.mark.parametrize(("name", "wanted"), [("ANOTHER", SHORT_SPIN), (SPIN_COUNT, "7"), ("OMP_WAIT_POLICY", None)])
def test_threads_sleep_soon_where_other_programs_have_the_cores_unless_the_user_decides(
    name: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in (SPIN_COUNT, "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(known, "")  # so that the test's end takes back what is set
        monkeypatch.delenv(known)
    monkeypatch.setenv(name, "7")
    with ExitStack() as stack:
        for _ in range(psutil.cpu_count() or 1):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline()
        others = OtherPrograms()
        time.sleep(0.3)
        share_busy_cores(others)
    assert os.environ.get(SPIN_COUNT) == wanted


def test_threads_that_have_cores_of_their_own_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SPIN_COUNT, "")
    monkeypatch.delenv(SPIN_COUNT)
    monkeypatch.setenv("OMP_NUM_THREADS", "0")  # no thread needs a core that others use
    share_busy_cores(OtherPrograms())
    assert SPIN_COUNT not in os.environ
