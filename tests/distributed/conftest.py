"""Shared by the tests of several processes."""

from __future__ import annotations

import pytest
from lost_runs import begin, complete, find_run  # type: ignore[import-not-found]

from training_lens.runs.run_folder import RunFolder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run of `lost_runs.begin`, left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    complete(begin(folder, "output.run_id=whole"))
    return find_run(folder, "whole")
