"""The kinds of faults: each gives the findings of some commands under it, tried often."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench import FSYNC, FULL, GOOD, KILL, SOURCE, WRITE, Bench, Finding, Tally, environment_of  # type: ignore[import-not-found]
from cases import CASES, Case  # type: ignore[import-not-found]

MIB = 2**20
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Commands that read a state; each damaged file of it meets each of them.
READERS = {
    "finished": ("infer", "export", "evaluate", "analyze", "report", "show", "sync", "tag", "doctor"),
    "interrupted": ("resume",),
    "prepared": ("train from a prepared folder",),
    "swept": ("sweep, resumed",),
}


def kill_often(bench: Bench, name: str, times: int, draw: random.Random) -> Tally:
    """Kill a command at the n-th write, fsync or rename, and after random times, in turn."""
    tally, case, calls = Tally(), CASES[name], bench.calls(CASES[name])
    for number in range(times):
        if number % 4 == 3 or not calls:
            seconds = draw.uniform(0.0, bench.seconds(case))
            tally.add(bench.disturb(case, f"kill after {seconds:.3f} s", signals=[(seconds, int(signal.SIGKILL))]))
        else:
            at = 1 + (number * calls) // times
            tally.add(bench.disturb(case, f"kill at call {at} of {calls}", at=at, action=KILL, kinds=7))
    return tally


def signal_often(bench: Bench, name: str, times: int, draw: random.Random) -> Tally:
    """TERM, INT or HUP at a random moment; every other time once more a moment later."""
    tally, case = Tally(), CASES[name]
    bench.wanted(case)
    for number in range(times):
        kind, moments = SIGNALS[number % len(SIGNALS)], [draw.uniform(0.0, bench.seconds(case))]
        moments += [moments[0] + draw.uniform(0.0, 0.5)] if number % 2 else []
        fault = f"{kind.name} after {', '.join(f'{seconds:.3f} s' for seconds in moments)}"
        tally.add(bench.disturb(case, fault, signals=[(seconds, int(kind)) for seconds in moments]))
    return tally


def signal_at_start(bench: Bench, times: int, draw: random.Random) -> Tally:
    """The same in the first seconds of a real process, which imports; then the command runs undisturbed."""
    tally, case = Tally(), CASES["validate"]
    bench.wanted(case)
    for number in range(times):
        kind, seconds = SIGNALS[number % len(SIGNALS)], draw.uniform(0.0, 3.0)
        with bench.sandbox(case.needs) as folder:
            process = subprocess.Popen(
                [sys.executable, "-m", "training_lens", *case.arguments],
                cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=os.environ | environment_of(folder) | {"PYTHONPATH": str(SOURCE)},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip
            time.sleep(seconds)
            process.send_signal(kind)
            text = process.communicate()[0]
            fault = f"{kind.name} after {seconds:.3f} s of a new process"
            found = Finding(case.name, fault, "traceback", text[-3000:])
            tally.add(found if "Traceback" in text else bench.run_again(case, fault, folder))
    return tally


def fill_often(bench: Bench, name: str, times: int, draw: random.Random) -> Tally:
    """Let the disk be full from the n-th write on; every fourth time a real one that has too little room."""
    tally, case, calls = Tally(), CASES[name], bench.calls(CASES[name])
    for number in range(times if calls else 0):
        if number % 4 == 3 and can_mount():
            with small_disk(bench, case, draw.randrange(4096, MIB)) as (folder, make_room, fault):
                tally.add(bench.disturb(case, fault, folder=folder, mend=make_room))
        else:
            at = 1 + (number * calls) // times
            tally.add(bench.disturb(case, f"full at call {at} of {calls}", at=at, action=FULL, kinds=WRITE | FSYNC))
    return tally


def damage_all(
    bench: Bench, state: str, kinds: Sequence[str], draw: random.Random, most: int = 0, readers: Sequence[str] = ()
) -> Tally:
    """Damage every file of a state, the ways in turn; each time every command that reads the state, or some."""
    tally, files = Tally(), bench.files(state)
    for number, name in enumerate(draw.sample(files, min(most, len(files))) if most else files):
        for place, reader in enumerate(readers or READERS[state]):
            tally.add(bench.damage(CASES[reader], name, kinds[(number + place) % len(kinds)], draw))
    return tally


def flip_cache(bench: Bench, times: int, draw: random.Random) -> Tally:
    """Flip one bit somewhere in the token cache, and train a step from it."""
    tally, case = Tally(), CASES["train a step"]
    bench.wanted(case)
    tokens = [name for name in bench.files(case.needs) if name.endswith("examples.arrow")]
    for _ in range(times):
        tally.add(bench.damage(case, draw.choice(tokens), "flip", draw))
    return tally


def break_machine(bench: Bench, name: str, draw: random.Random) -> Tally:
    """No home, no threads, little memory, a clock that goes back, two at once, a read-only folder, a full /tmp."""
    tally, case = Tally(), CASES[name]
    homeless: dict[str, Any] = {"environment": {"HOME": "/proc/none"}, "unset": ["XDG_STATE_HOME", "XDG_CACHE_HOME"]}
    tally.add(bench.disturb(case, "no home", **homeless))
    for threads in (0, 1, 2):
        tally.add(bench.disturb(case, f"no thread after {threads}", threads=threads))
    for mib in (8, 64, 256, draw.randrange(8, 512)):
        tally.add(bench.disturb(case, f"{mib} MiB of memory", memory=mib * MIB))
    for back in (3600, 86_400 * 365):
        after = draw.randrange(1, 400)
        tally.add(bench.disturb(case, f"the clock {back} s back after {after} readings", clock=[after, back]))
    tally.add(run_two(bench, case))
    if can_mount():
        with bench.sandbox(case.needs) as folder, full_disk(folder.parent / "tmp"):
            tally.add(bench.disturb(case, "a full /tmp", folder=folder))
        with bench.sandbox(case.needs) as folder, read_only(folder) as make_writable:
            tally.add(bench.disturb(case, "a read-only folder", folder=folder, mend=make_writable))
    return tally


def run_two(bench: Bench, case: Case) -> Finding:
    """The same command twice at once: one result, as of one; whoever comes too late may say so."""
    bench.wanted(case)
    fault = "two at once"
    with bench.sandbox(case.needs) as folder:
        ended = bench.server.run_copies(2, case.arguments, folder)
        found = [bench.judge(case, fault, each, folder) for each in ended]
        bad = [finding for finding in found if finding.outcome not in GOOD]
        if not bad and all(finding.outcome == "clear error" for finding in found):
            return bench.run_again(case, fault, folder)
        return next(iter(bad), min(found, key=lambda finding: GOOD.index(finding.outcome)))


def can_mount() -> bool:
    """Whether file systems may be mounted here, as by root."""
    return os.geteuid() == 0 and shutil.which("mount") is not None and not subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    ).returncode  # fmt: skip


@contextmanager
def mounted(folder: Path, *how: str) -> Iterator[None]:
    subprocess.run(["mount", *how, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def small_disk(bench: Bench, case: Case, room: int) -> Iterator[tuple[Path, Callable[[], None], str]]:
    """A sandbox on a disk with so many bytes left, what makes room on it, and its name."""
    with bench.sandbox() as folder, mounted(folder, "-t", "tmpfs", "-o", "size=1g", "none"):
        shutil.copytree(bench.place / "states" / case.needs, folder, symlinks=True, dirs_exist_ok=True)

        def resize(size: int) -> None:
            subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

        resize(shutil.disk_usage(folder).used + room)
        yield folder, lambda: resize(1024 * MIB), f"a disk with {room} bytes left"


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    with mounted(folder, "-t", "tmpfs", "-o", "size=16k", "none"):
        with suppress(OSError):
            (folder / "filled").write_bytes(bytes(MIB))
        yield


@contextmanager
def read_only(folder: Path) -> Iterator[Callable[[], None]]:
    """The folder may not be written, until what is yielded is called."""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,bind,{how}", str(folder)], check=True)

    with mounted(folder, "--bind", str(folder)):
        remount("ro")
        yield lambda: remount("rw")
