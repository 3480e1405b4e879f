"""The examples in the docstrings of the measures are correct."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from training_lens.measures import barrier, directions
from training_lens.measures import curves as convergence
from training_lens.measures import singular_values as spectra
from training_lens.measures import subspaces as similarity


@pytest.mark.parametrize("module", [barrier, convergence, directions, similarity, spectra])
def test_examples(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0
