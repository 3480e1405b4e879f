"""Commands that are killed, starved of disk, or given damaged files: what became of each, in one of five words.

The rule: the same result, or a clear error; never another result, never a traceback, never a file elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cases import CASES, FOLDER, TRAIN, Case, Result, write_rows  # type: ignore[import-not-found]

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
WRITE, FSYNC, RENAME = 1, 2, 4
KILL, FULL = 1, 2
KILLED = -9
MOST_SECONDS, MOST_BYTES = 30.0, 2 * 2**30

Outcome = Literal["same result", "clear error", "other result", "traceback", "over 30 s", "over 2 GB", "outside write"]
GOOD: tuple[Outcome, ...] = ("same result", "clear error")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed; `calls` by which it changed files."""

    code: int
    seconds: float
    bytes: int
    calls: int
    text: str


@dataclass
class Finding:
    """What became of one disturbed command."""

    case: str
    fault: str
    outcome: Outcome
    text: str = ""


@dataclass
class Tally:
    """All findings of one kind of fault."""

    findings: list[Finding] = field(default_factory=list)

    def counts(self) -> dict[str, Counter[str]]:
        """By case, how often each outcome came."""
        found: dict[str, Counter[str]] = {}
        for finding in self.findings:
            found.setdefault(finding.case, Counter())[finding.outcome] += 1
        return found

    @property
    def bad(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.outcome not in GOOD]


class Server:
    """A fork server, see `fork_server.py`; one command at a time."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._count = 0
        library = place / "interpose.so"
        if not library.is_file():
            source = str(HERE / "interpose.c")
            subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py")],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=place,
        )  # fmt: skip
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def run(self, arguments: Sequence[str], folder: Path, **fault: Any) -> Ended:
        """Run a command in a folder; `fault` as `fork_server.serve` takes it."""
        assert self._process.stdin and self._process.stdout
        output = self._place / "output.txt"
        around = folder.parent
        environment = {
            "HOME": str(around / "home"),
            "XDG_STATE_HOME": str(around / "home/state"),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),  # compiled kernels
            "TMPDIR": str(around / "tmp"),
        }
        request = {"arguments": list(arguments), "folder": str(folder), "output": str(output), **fault}
        request["environment"] = environment | request.get("environment", {})
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Ended(**answer, text=output.read_text(errors="replace"))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()


class Bench:
    """The states that commands start in, each made once, and the results of undisturbed commands."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        self.server = Server(place)
        self._wanted: dict[str, Result] = {}
        self._calls: dict[str, int] = {}
        self._make_states()

    def _make_states(self) -> None:
        for name in ("rows", "finished", "interrupted"):
            if not (self.place / "states" / name).is_dir():
                with self.sandbox() as folder:
                    write_rows(folder)
                    if name == "finished":
                        self._must(TRAIN, folder)
                    elif name == "interrupted":  # killed behind the checkpoint of step 2
                        self._kill_at_step(folder)
                    shutil.copytree(folder, self.place / "states" / name, symlinks=True)

    def _kill_at_step(self, folder: Path) -> None:
        for at in range(44, 400, 4):
            shutil.rmtree(folder / "outputs", ignore_errors=True)
            self.server.run(TRAIN, folder, kinds=RENAME, at=at, action=KILL)
            steps = [path.name for path in (folder / FOLDER / "checkpoints").glob("step-*")]
            if steps == ["step-00000002"]:
                return
        raise RuntimeError(f"no kill left step 2 alone: {steps}")

    def _must(self, arguments: Sequence[str], folder: Path) -> Ended:
        ended = self.server.run(arguments, folder, kinds=7)
        if ended.code:
            raise RuntimeError(f"undisturbed, {arguments} ended with {ended.code}:\n{ended.text}")
        return ended

    @contextmanager
    def sandbox(self, state: str | None = None) -> Iterator[Path]:
        """A folder in such a state, with a home, a folder for temporary files, and neighbours that stay as they are."""
        around = self.place / "sandbox"
        shutil.rmtree(around, ignore_errors=True)
        for name in ("home", "tmp", "neighbour"):
            (around / name).mkdir(parents=True)
        (around / "neighbour/kept.txt").write_text("kept")
        folder = around / "work"
        if state is None:
            folder.mkdir()
        else:
            shutil.copytree(self.place / "states" / state, folder, symlinks=True)
        yield folder

    def wanted(self, case: Case) -> Result:
        """What the undisturbed command leaves, and how many calls it takes."""
        if case.name not in self._wanted:
            with self.sandbox(case.needs) as folder:
                self._calls[case.name] = self._must(case.arguments, folder).calls
                self._wanted[case.name] = case.result(folder)
                if not self._wanted[case.name]:
                    raise RuntimeError(f"{case.name}: no result to compare")
        return self._wanted[case.name]

    def calls(self, case: Case) -> int:
        """By how many calls the undisturbed command changes files."""
        self.wanted(case)
        return self._calls[case.name]

    def kill(self, case: Case, fault: str, **how: Any) -> Finding:
        """Kill a command, call it again, and compare the result."""
        with self.sandbox(case.needs) as folder:
            first = self.server.run(case.arguments, folder, **how)
            if first.code not in (KILLED, 0):
                return self._judge(case, fault, first, folder)
            again = case.again if case.again and (folder / FOLDER / "metadata").is_dir() else case.arguments
            second = first if first.code == 0 else self.server.run(again, folder)
            if second.code and again != case.arguments and (folder / FOLDER).is_dir():
                second = self._follow_advice(case, second, folder)
            return self._judge(case, fault, second, folder)

    def _follow_advice(self, case: Case, ended: Ended, folder: Path) -> Ended:
        """The command that the error names, where it names the one to begin anew."""
        return self.server.run(case.arguments, folder) if "training-lens train" in ended.text else ended

    def starve(self, case: Case, fault: str, **how: Any) -> Finding:
        """Let the disk be full from one call on; then make room, and call it again."""
        with self.sandbox(case.needs) as folder:
            first = self.server.run(case.arguments, folder, **how)
            found = self._judge(case, fault, first, folder)
            if found.outcome != "clear error":
                return found
            again = case.again if case.again and (folder / FOLDER / "metadata").is_dir() else case.arguments
            second = self.server.run(again, folder)
            if second.code:
                second = self._follow_advice(case, second, folder)
            return self._judge(case, fault, second, folder)

    def damage(self, case: Case, name: str, kind: str, draw: random.Random) -> Finding:
        """Damage a file of the state, and let the command read it."""
        with self.sandbox(case.needs) as folder:
            damage_file(folder / name, kind, draw)
            return self._judge(case, f"{kind} {name}", self.server.run(case.arguments, folder), folder)

    def _judge(self, case: Case, fault: str, ended: Ended, folder: Path) -> Finding:
        def found(outcome: Outcome) -> Finding:
            return Finding(case.name, fault, outcome, "" if outcome in GOOD else ended.text[-2000:])

        if has_strayed(folder.parent):
            return found("outside write")
        if ended.seconds > MOST_SECONDS:
            return found("over 30 s")
        if ended.bytes > MOST_BYTES:
            return found("over 2 GB")
        if "Traceback (most recent call last)" in ended.text or ended.code not in (0, 1, 2):
            return found("traceback")
        if ended.code:
            return found("clear error" if "error: " in ended.text else "traceback")
        return found("same result" if is_same(case.result(folder), self.wanted(case)) else "other result")


def is_same(found: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return dict(found) == dict(wanted)


def has_strayed(around: Path) -> bool:
    """Whether anything was written beside the folder, its home and its temporary files."""
    kept = around / "neighbour/kept.txt"
    names = {path.name for path in around.iterdir()}
    return names != {"home", "tmp", "neighbour", "work"} or not kept.is_file() or kept.read_text() != "kept"


def damage_file(path: Path, kind: str, draw: random.Random) -> None:
    """Flip one bit of a file, cut it somewhere, empty it, or delete it."""
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
        return
    if kind == "flip" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content) if kind == "flip" else bytes(content[: draw.randrange(len(content) or 1)]))


def files_of(state: Path) -> list[str]:
    """What the product wrote in a state, by name: no locks, which are not read, and not the user's rows."""
    found = (path for path in sorted((state / "outputs").rglob("*")) if path.is_file() and path.suffix != ".lock")
    return [path.relative_to(state).as_posix() for path in found if path.stat().st_size]


def kill_often(bench: Bench, names: Sequence[str], each: int, draw: random.Random) -> Tally:
    """Kill commands at the n-th write, fsync or rename, and after random times, in turn."""
    tally = Tally()
    for name in names:
        case, calls = CASES[name], bench.calls(CASES[name])
        for number in range(each):
            if number % 4 == 3:
                seconds = draw.uniform(0.0, 1.5)
                tally.findings.append(bench.kill(case, f"kill after {seconds:.3f} s", signals=[(seconds, 9)]))
            else:
                at = 1 + (number * calls) // each
                tally.findings.append(bench.kill(case, f"kill at call {at} of {calls}", at=at, action=KILL, kinds=7))
    return tally


def starve_often(bench: Bench, names: Sequence[str], each: int) -> Tally:
    """Let the disk be full from the n-th write on."""
    tally = Tally()
    for name in names:
        case, calls = CASES[name], bench.calls(CASES[name])
        for number in range(each):
            at = 1 + (number * calls) // each
            tally.findings.append(bench.starve(case, f"full at call {at} of {calls}", at=at, action=FULL, kinds=3))
    return tally


READERS = {
    "finished": ("infer", "export", "compare"),
    "interrupted": ("resume",),
}


def damage_all(bench: Bench, states: Sequence[str], kinds: Sequence[str], draw: random.Random, most: int = 0) -> Tally:
    """Damage every file of each state in each way; each time a command that reads the state, in turn."""
    tally = Tally()
    for state in states:
        files = files_of(bench.place / "states" / state)
        chosen = draw.sample(files, min(most, len(files))) if most else files
        for number, name in enumerate(chosen):
            for kind in kinds:
                reader = READERS[state][number % len(READERS[state])]
                tally.findings.append(bench.damage(CASES[reader], name, kind, draw))
    return tally
