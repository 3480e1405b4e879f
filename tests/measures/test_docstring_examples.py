"""The examples in the docstrings of the measures are correct."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from training_lens.measures import curves as convergence
from training_lens.measures import directions, exposure, row_influence, row_life
from training_lens.measures import singular_values as spectra


@pytest.mark.parametrize("module", [convergence, directions, exposure, row_influence, row_life, spectra])
def test_examples(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0
