"""Killed, starved of disk, given damaged files: the same result or a clear error. `make faults` tries far more."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator

import pytest
from harness import Bench, Tally, damage_all, kill_often, starve_often  # type: ignore[import-not-found]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="calls are counted by a preloaded library, as on Linux"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="that library needs a C compiler"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("faults"))
    yield bench
    bench.server.close()


def require_good(tally: Tally, at_least: int) -> None:
    assert [(f.case, f.fault, f.outcome, f.text) for f in tally.bad] == []
    assert sum(finding.outcome == "same result" for finding in tally.findings) >= at_least


def test_what_is_killed_and_called_again_ends_as_if_it_had_not_been(bench: Bench) -> None:
    draw = random.Random(11)
    require_good(kill_often(bench, ["train"], 2, draw), at_least=2)
    require_good(kill_often(bench, ["prepare", "export", "tag"], 4, draw), at_least=9)


def test_a_full_disk_is_a_clear_error_and_room_mends_it(bench: Bench) -> None:
    require_good(starve_often(bench, ["prepare", "export", "tag"], 3), at_least=7)


def test_a_damaged_file_changes_no_result_in_silence(bench: Bench) -> None:
    draw = random.Random(7)
    require_good(damage_all(bench, ["finished"], ["flip", "cut", "delete"], draw, most=2), at_least=1)
    require_good(damage_all(bench, ["interrupted"], ["flip"], draw, most=1), at_least=0)
