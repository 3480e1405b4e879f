"""Kernels in C take what they can compute, and leave the rest to torch with a reason."""

from __future__ import annotations

import ctypes
import logging
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training_lens.models.fast.native import attention_kernels, decoding_kernels, training_kernels
from training_lens.models.fast.native import library as calls
from training_lens.utils.compiling import OPTIONS, find_compiler

IS_X86 = platform.machine() in ("x86_64", "AMD64")  # whose compilers know of processors with AVX512-BF16
MODULES = (attention_kernels, decoding_kernels, training_kernels)
CALLS = [v for module in MODULES for n, v in vars(module).items() if n.endswith("Call") and hasattr(v, "kernel")]


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    calls.load_library.cache_clear()
    yield
    calls.load_library.cache_clear()


def test_without_a_compiler_nothing_is_taken_and_the_log_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO, "training_lens"):
        assert not calls.can_compute(torch.zeros(2))
        assert not calls.can_compute(torch.zeros(3))
    assert [record.message for record in caplog.records] == [
        "norms, gates, attention and softmax are computed by torch, in more passes: "
        "there is no C compiler (no-such-compiler)"
    ]


@pytest.mark.skipif(calls.load_library() is None, reason="no C compiler here")
def test_numbers_of_other_kinds_are_not_taken() -> None:
    assert calls.can_compute(torch.zeros(2), torch.zeros(3))
    assert not calls.can_compute(torch.zeros(2, dtype=torch.float16))
    assert not calls.can_compute(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not calls.can_compute(torch.zeros(2, device="meta"))


@pytest.mark.skipif(calls.load_library() is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", ["float", "double", "bfloat16"])
def test_the_arguments_in_python_lie_where_c_reads_them(dtype: str, tmp_path: Path) -> None:
    checks, unit = [f'#include "{calls.SOURCES[0]}"', "#include <stddef.h>"], ""
    for kind in CALLS:
        if kind.kernel == "few_rows" and not (dtype == "bfloat16" and IS_X86):
            continue
        struct = f"struct {kind.kernel.replace('attend_back', 'attend')}_call_{dtype}"
        checks.append(f'_Static_assert(sizeof({struct}) == {ctypes.sizeof(kind)}, "{struct}");')
        for name, field in kind._fields_:
            unit, place = f"{struct}.{name}", getattr(kind, name)
            checks.append(f'_Static_assert(offsetof({struct}, {name}) == {place.offset}, "{unit}");')
            kinds = {ctypes.c_int64: "int64_t", ctypes.c_double: "double"}
            if field in kinds:
                checks.append(
                    f'_Static_assert(_Generic((({struct} *)0)->{name}, {kinds[field]}: 1, default: 0), "{unit}");'
                )
    assert len({kind.kernel for kind in CALLS}) == 12 and unit
    source = tmp_path / "layout.c"
    source.write_text("\n".join(checks) + "\n")
    command = [
        *find_compiler(),
        *OPTIONS,
        f"-march={'cooperlake' if IS_X86 else 'native'}",
        "-fsyntax-only",
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_a_field_without_a_value_is_no_call() -> None:
    with pytest.raises(AssertionError, match="every field"):
        training_kernels.GateCall(gate_up=torch.zeros(2), y=torch.zeros(1), width=1)
