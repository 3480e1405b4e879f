"""Runs commands under a fault, and says what became of each in one of seven words.

The rule: the same result, or a clear error; never another result, never a traceback, never a file elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cases import FOLDER, ONE_STEP, PREPARE, SWEEP, TRAIN, Case, Result, files_of, write_inputs  # type: ignore[import-not-found]

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
WRITE, FSYNC, RENAME = 1, 2, 4
KILL, FULL = 1, 2
DIED_TWICE = "its process died twice"  # of a sweep's trial, which is given up then, as documented
MOST_SECONDS, MOST_WAITED, MOST_BYTES = 30.0, 120.0, 2 * 2**30  # of the processor; by the clock

Outcome = Literal[
    "same result",
    "clear error",
    "partial, named",
    "other result",
    "traceback",
    "over 30 s",
    "over 2 GB",
    "outside write",
]  # "partial, named": what a damaged record held is left out, and the output names its file
GOOD: tuple[Outcome, ...] = ("same result", "clear error", "partial, named")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed; `calls` by which it changed files."""

    code: int
    seconds: float
    cpu_seconds: float
    bytes: int
    calls: int
    output: str = ""
    text: str = ""

    @property
    def is_cut_off(self) -> bool:
        """Whether a signal ended it."""
        return self.code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 130, 143)


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

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)

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
    """A fork server, see `fork_server.py`; one request at a time."""

    def __init__(self, place: Path, environment: Mapping[str, str]) -> None:
        self._place = place
        library = place / "interpose.so"
        if not library.is_file():
            source = str(HERE / "interpose.c")
            subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True)
        more = {"LD_PRELOAD": str(library), "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py")],
            env=os.environ | more | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=place,
        )  # fmt: skip
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def run(self, arguments: Sequence[str], folder: Path, **fault: Any) -> Ended:
        """Run a command in a folder; `fault` as `fork_server.serve` takes it."""
        return self.run_copies(1, arguments, folder, **fault)[0]

    def run_copies(self, copies: int, arguments: Sequence[str], folder: Path, **fault: Any) -> list[Ended]:
        """The same command several times at once."""
        assert self._process.stdin and self._process.stdout
        outputs = [self._place / f"output-{number}.txt" for number in range(copies)]
        request = {"arguments": list(arguments), "folder": str(folder), "outputs": [str(path) for path in outputs]}
        request |= fault | {"environment": environment_of(folder) | fault.get("environment", {})}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answers = json.loads(self._process.stdout.readline())
        texts = [(path.read_text(errors="replace"), errors_of(path).read_text(errors="replace")) for path in outputs]
        return [
            Ended(**answer, output=text[0], text="\n".join(text)) for answer, text in zip(answers, texts, strict=True)
        ]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()


def errors_of(output: Path) -> Path:
    """Where the fork server writes standard error."""
    return output.with_name(f"{output.name}.errors")


def environment_of(folder: Path) -> dict[str, str]:
    """A home and a place for temporary files beside the folder."""
    around = folder.parent
    return {
        "HOME": str(around / "home"),
        "XDG_STATE_HOME": str(around / "home/state"),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),  # compiled kernels
        "TMPDIR": str(around / "tmp"),
    }


class Bench:
    """The states that commands start in, each made once, and the results of undisturbed commands."""

    def __init__(self, place: Path, environment: Mapping[str, str] | None = None) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        self.server = Server(place, environment or {})
        self._wanted: dict[str, Result] = {}
        self._calls: dict[str, int] = {}
        self._seconds: dict[str, float] = {}

    def _make_state(self, name: str) -> Path:
        state = self.place / "states" / name
        if not state.is_dir():
            with self.sandbox() as folder:
                write_inputs(folder)
                self._fill_state(name, folder)
                shutil.copytree(folder, state, symlinks=True)
        return state

    def _fill_state(self, name: str, folder: Path) -> None:
        if name == "finished":
            self._must(TRAIN, folder)
        elif name == "cached":
            self._must(ONE_STEP, folder)
            shutil.rmtree(folder / "outputs/experiments")
        elif name == "prepared":
            self._must(PREPARE, folder)
        elif name == "interrupted":  # killed behind the checkpoint of step 2
            self._kill_at_step(folder)
        elif name == "swept":  # killed in the second trial
            self._kill_in_second_trial(folder)

    def files(self, state: str) -> list[str]:
        """What the product wrote in a state, by name."""
        return files_of(self._make_state(state))

    def _kill_at_step(self, folder: Path) -> None:
        """Halves the renames among which is one between the checkpoints of steps 2 and 4."""
        low, high, steps = 1, 400, list[str]()
        while low < high:
            at = (low + high) // 2
            shutil.rmtree(folder / "outputs", ignore_errors=True)
            self.server.run(TRAIN, folder, kinds=RENAME, at=at, action=KILL)
            steps = [path.name for path in (folder / FOLDER / "checkpoints").glob("step-*")]
            if steps == ["step-00000002"]:
                return
            low, high = (low, at) if steps else (at + 1, high)
        raise RuntimeError(f"no kill left step 2 alone: {steps}")

    def _kill_in_second_trial(self, folder: Path) -> None:
        seconds = self._must(SWEEP, folder).seconds
        for share in (0.6, 0.7, 0.5, 0.8):
            shutil.rmtree(folder / "outputs", ignore_errors=True)
            self.server.run(SWEEP, folder, signals=[(seconds * share, signal.SIGKILL)])
            if len(list(folder.glob("outputs/experiments/*/runs/*"))) == 2:
                return
        raise RuntimeError("no kill left a sweep in its second trial")

    def _must(self, arguments: Sequence[str], folder: Path) -> Ended:
        ended = self.server.run(arguments, folder, kinds=7)
        if ended.code:
            raise RuntimeError(f"undisturbed, {arguments} ended with {ended.code}:\n{ended.text}")
        return ended

    @contextmanager
    def sandbox(self, state: str | None = None) -> Iterator[Path]:
        """A folder in such a state, with a home, a folder for temporary files, and neighbours that stay as they are."""
        source = self._make_state(state) if state else None
        around = self.place / "sandbox"
        shutil.rmtree(around, ignore_errors=True)
        for name in ("home", "tmp", "neighbour", "work"):
            (around / name).mkdir(parents=True)
        (around / "neighbour/kept.txt").write_text("kept")
        if source:
            shutil.copytree(source, around / "work", symlinks=True, dirs_exist_ok=True)
        yield around / "work"

    def wanted(self, case: Case) -> Result:
        """What the undisturbed command leaves, and how many calls it takes."""
        if case.name not in self._wanted:
            with self.sandbox(case.needs) as folder:
                ended = self._must(case.arguments, folder)
                self._calls[case.name], self._seconds[case.name] = ended.calls, ended.seconds
                self._wanted[case.name] = case.result(folder, ended.output)
                if not self._wanted[case.name]:
                    raise RuntimeError(f"{case.name}: no result to compare")
        return self._wanted[case.name]

    def calls(self, case: Case) -> int:
        """By how many calls the undisturbed command changes files."""
        self.wanted(case)
        return self._calls[case.name]

    def seconds(self, case: Case) -> float:
        """How long the undisturbed command takes."""
        self.wanted(case)
        return self._seconds[case.name]

    def disturb(self, case: Case, fault: str, *, folder: Path | None = None, mend: Callable[[], None] | None = None,
                **how: Any) -> Finding:  # fmt: skip
        """Run a command under a fault; where it did not end well, mend what was wrong, and run it again.

        Args:
            folder: where it runs, if not in a sandbox of its own.
            mend: what ends the fault before the second call.
            how: the fault, as `fork_server.serve` takes it.
        """
        self.wanted(case)  # made in the same sandbox
        if folder is None:
            with self.sandbox(case.needs) as fresh:
                return self.disturb(case, fault, folder=fresh, mend=mend, **how)
        first = self.server.run(case.arguments, folder, **how)
        found = self.judge(case, fault, first, folder)
        if first.is_cut_off:
            found = replace(found, outcome="traceback" if "Traceback" in first.text else "clear error")
        if found.outcome != "clear error":
            return found
        if mend:
            mend()
        return self.run_again(case, fault, folder)

    def run_again(self, case: Case, fault: str, folder: Path) -> Finding:
        """What a user types after a command ended badly; and, where that says to begin anew, that."""
        again = case.again if case.again and (folder / FOLDER / "metadata").is_dir() else case.arguments
        ended = self.server.run(again, folder)
        if ended.code and again != case.arguments and "training-lens train" in ended.text:
            ended = self.server.run(case.arguments, folder)
        return self.judge(case, fault, ended, folder)

    def damage(self, case: Case, name: str, kind: str, draw: random.Random) -> Finding:
        """Damage a file of the state, and let the command read it."""
        self.wanted(case)
        with self.sandbox(case.needs) as folder:
            damage_file(folder / name, kind, draw)
            ended = self.server.run(case.arguments, folder)
            found = self.judge(case, f"{kind} {name}", ended, folder)
            is_named = Path(name).name in "".join(ended.text.split())  # tables and narrow screens break lines
            return replace(found, outcome="partial, named") if found.outcome == "other result" and is_named else found

    def judge(self, case: Case, fault: str, ended: Ended, folder: Path) -> Finding:
        """What became of it; its result is read only where it ended well."""

        def found(outcome: Outcome) -> Finding:
            return Finding(case.name, fault, outcome, "" if outcome in GOOD else ended.text[-3000:])

        if has_strayed(folder.parent):
            return found("outside write")
        if ended.cpu_seconds > MOST_SECONDS or ended.seconds > MOST_WAITED:
            return found("over 30 s")
        if ended.bytes > MOST_BYTES:
            return found("over 2 GB")
        if "Traceback (most recent call last)" in ended.text or ended.code not in (0, 1, 2):
            return found("traceback")
        if ended.code:
            is_clear = "error: " in ended.text or (case.looks_for_damage and "\nno  " in ended.text)
            is_clear |= "later: training-lens sync" in ended.text  # what could not be sent, with the reason
            return found("clear error" if is_clear else "traceback")
        if self._has_result(case, folder, ended):
            return found("same result")
        return found("partial, named" if DIED_TWICE in ended.text else "other result")

    def _has_result(self, case: Case, folder: Path, ended: Ended) -> bool:
        try:
            found = case.result(folder, ended.output)
        except (OSError, ValueError):  # the result is not there, or cannot be read
            return False
        return found == self.wanted(case)


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
