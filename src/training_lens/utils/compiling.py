"""Compiles our C sources on the user's machine, for its processor, and caches the library."""

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

from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
COMPILERS = ("cc", "gcc", "clang")  # tried in this order if CC is not set
OPTIONS = ("-O3", "-std=gnu11", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
LONGEST = 180  # seconds for one compilation


class CompilationError(Exception):
    """There is no compiler, or it rejects the source."""


def compile_library(sources: Sequence[Path], name: str) -> ctypes.CDLL:
    """The library compiled from the first of `sources`, which may include the others.

    It is cached in XDG_CACHE_HOME, else ~/.cache, under a hash of the sources, the compiler, its options and the
    processor. If that folder cannot be written, it is compiled each time.

    Raises:
        CompilationError: there is no compiler, or it rejects the source.
    """
    is_x86 = platform.machine() in {"x86_64", "AMD64"}
    native = ["-march=native", "-mprefer-vector-width=512"] if is_x86 else ["-mcpu=native"]
    plain = [*find_compiler(), *OPTIONS]
    try:
        return _load_or_build([*plain, *native], sources, name)
    except CompilationError as error:
        if "native" not in str(error):
            raise
        logger.info("%s; compiled for any processor of this kind, which is slower", error)
        return _load_or_build(plain, sources, name)


def _load_or_build(command: Sequence[str], sources: Sequence[Path], name: str) -> ctypes.CDLL:
    inputs = [*(s.read_bytes() for s in sources), shlex.join(command).encode(), _describe_processor().encode()]
    digest = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:24]
    cached = cache_folder() / f"{name}-{digest}.so"
    if _is_ours(cached):
        return _load_library(cached)
    try:
        cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _build_library(command, sources[0], cached)
    except OSError:
        with tempfile.TemporaryDirectory() as folder:  # a loaded library needs its file no longer
            return _build_library(command, sources[0], Path(folder) / cached.name)


def find_compiler() -> list[str]:
    """The command of the C compiler: CC if set, else the first one found.

    Raises:
        CompilationError: none is found.
    """
    named = shlex.split(os.environ.get("CC", ""))
    found = next((path for path in map(shutil.which, named[:1] or COMPILERS) if path), None)
    if os.name != "posix" or found is None:
        raise CompilationError(f"there is no C compiler ({', '.join(named[:1] or COMPILERS)})")
    return [found, *named[1:]]


def _describe_processor() -> str:
    """The processor's model and features, which decide what `-march=native` generates."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def cache_folder() -> Path:
    """The folder of compiled libraries."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "training-lens"


def _is_ours(library: Path) -> bool:
    """Whether the library exists and only this user can have written it."""
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
        messages = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise CompilationError(f"{command[0]} refuses the source: {messages[0]}")


def _load_library(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompilationError(f"{library} cannot be loaded: {error}") from error
