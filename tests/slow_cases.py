"""Which cases of a test are quick enough for `make test`; the others run in `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def slow_but(quick: Sequence[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases of a parameter, all but the quick ones marked slow."""
    return [case if case in quick else mark_slow(case) for case in cases]


def mark_slow(case: Any) -> Any:
    """A case, of one parameter or a tuple of several, that is left out of `make test`."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
