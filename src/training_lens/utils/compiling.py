"""C of ours compiled on the user's machine, for the very processor that it has, and kept for the next time."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")  # tried in this order, where CC names none
OPTIONS = ("-O3", "-std=gnu11", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
LONGEST = 180  # seconds that a compiler may take


class CompilationError(Exception):
    """Why there is no library: no compiler, or one that refuses the source."""


def compile_library(sources: Sequence[Path], name: str) -> ctypes.CDLL:
    """The library of the first of `sources`, which may include the others.

    It is kept in the user's cache folder (XDG_CACHE_HOME, else ~/.cache), under a name of what it was made from: the
    sources, the compiler, its options, the processor. Where that folder cannot be written, it is made anew each time.

    Raises:
        CompilationError: see there.
    """
    command = [*find_compiler(), *OPTIONS, *_processor_options()]
    made_from = [
        *(source.read_bytes() for source in sources),
        shlex.join(command).encode(),
        _describe_processor().encode(),
    ]
    digest = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:24]
    kept = cache_folder() / f"{name}-{digest}.so"
    if _is_ours(kept):
        return _load_library(kept)
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _build_library(command, sources[0], kept)
    except OSError:
        with tempfile.TemporaryDirectory() as folder:  # a library that is loaded needs its file no more
            return _build_library(command, sources[0], Path(folder) / kept.name)


def find_compiler() -> list[str]:
    """The command of the C compiler: what CC says, else the first that is there.

    Raises:
        CompilationError: there is none.
    """
    named = shlex.split(os.environ.get("CC", ""))
    found = next((path for path in map(shutil.which, named[:1] or COMPILERS) if path), None)
    if os.name != "posix" or found is None:
        raise CompilationError(f"there is no C compiler ({', '.join(named[:1] or COMPILERS)})")
    return [found, *named[1:]]


def _processor_options() -> list[str]:
    if platform.machine() in {"x86_64", "AMD64"}:
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


def _describe_processor() -> str:
    """What tells processors apart as a compiler does that compiles for its own."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "training-lens"


def _is_ours(library: Path) -> bool:
    """Whether it is there, and nobody else can have written it."""
    try:
        found = library.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _build_library(command: Sequence[str], source: Path, library: Path) -> ctypes.CDLL:
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        _run_compiler([*command, str(source), "-o", temporary, "-lm"])
        Path(temporary).chmod(0o700)
        loaded = _load_library(Path(temporary))
        Path(temporary).replace(library)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return loaded


def _run_compiler(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        raise CompilationError(f"{command[0]} took more than {LONGEST} seconds") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise CompilationError(f"{command[0]} refuses the source: {said[0]}")


def _load_library(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompilationError(f"{library} cannot be loaded: {error}") from error
