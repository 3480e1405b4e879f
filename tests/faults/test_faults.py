"""Killed, starved of disk, given damaged files: the same result or a clear error. `make faults` tries far more."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from bench import Bench, Finding, Tally  # type: ignore[import-not-found]
from cases import CASES  # type: ignore[import-not-found]
from kinds import damage_all, fill_often, kill_often, run_two, signal_often  # type: ignore[import-not-found]
from slow_cases import slow_but  # type: ignore[import-not-found]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="calls are counted by a preloaded library, as on Linux"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="that library needs a C compiler"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("faults"))
    yield bench
    bench.server.close()


def require_good(tallies: list[Tally], at_least: int) -> None:
    findings: list[Finding] = [finding for tally in tallies for finding in tally.findings]
    assert [(f.case, f.fault, f.outcome, f.text) for tally in tallies for f in tally.bad] == []
    assert sum(finding.outcome == "same result" for finding in findings) >= at_least


@pytest.mark.slow
def test_a_training_that_is_killed_and_called_again_ends_as_if_it_had_not_been(bench: Bench) -> None:
    require_good([kill_often(bench, "train", 1, random.Random(11))], at_least=1)


@pytest.mark.slow
def test_what_is_killed_and_called_again_ends_as_if_it_had_not_been(bench: Bench) -> None:
    draw = random.Random(11)
    require_good([kill_often(bench, name, 2, draw) for name in ("prepare", "tag")], at_least=4)


@pytest.mark.slow
def test_an_export_that_is_killed_and_called_again_ends_as_if_it_had_not_been(bench: Bench) -> None:
    require_good([kill_often(bench, "export", 2, random.Random(11))], at_least=2)


@pytest.mark.parametrize("name", slow_but(["prepare"], ["prepare", "export", "tag"]))
def test_a_full_disk_is_a_clear_error_and_room_mends_it(bench: Bench, name: str) -> None:
    require_good([fill_often(bench, name, 2, random.Random(5))], at_least=2)


@pytest.mark.slow
def test_a_signal_is_no_traceback_and_the_next_call_ends_well(bench: Bench) -> None:
    require_good([signal_often(bench, "prepare", 2, random.Random(3))], at_least=2)


@pytest.mark.slow
def test_little_memory_no_threads_and_a_clock_that_goes_back_change_no_result(bench: Bench) -> None:
    shortages: list[tuple[str, dict[str, Any]]] = [
        ("infer", {"memory": 2**26}),
        ("infer", {"threads": 0}),
        ("export", {"threads": 0}),
    ]
    tally = Tally(
        [bench.disturb(CASES[name], str(how), **how) for name, how in [*shortages, ("tag", {"clock": [9, 99]})]]
    )
    tally.add(run_two(bench, CASES["prepare"]))
    require_good([tally], at_least=5)


@pytest.mark.slow
def test_a_damaged_file_changes_no_result_in_silence(bench: Bench) -> None:
    ways, readers = ["flip", "cut", "delete"], ("infer", "export", "show", "tag")
    require_good([damage_all(bench, "finished", ways, random.Random(7), most=1, readers=readers)], at_least=1)


@pytest.mark.slow
def test_a_damaged_file_of_an_interrupted_run_changes_no_result_in_silence(bench: Bench) -> None:
    require_good([damage_all(bench, "interrupted", ["flip"], random.Random(7), most=1)], at_least=0)
