"""All findings together: sound runs are not accused, what is missing is no error, and the page lists them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_lens.analysis.findings import diagnose
from training_lens.analysis.findings.diagnosis import CHECKS
from training_lens.core.recording import Recording

Record = Callable[..., Recording]
SETTINGS = {"total_steps": 200, "steps_per_epoch": 100}
PAGE = Path(__file__).parents[3] / "docs" / "lens" / "findings.md"


@pytest.mark.parametrize("seed", range(6))
def test_a_sound_run_is_not_accused(sound: Any, record: Record, seed: int) -> None:
    found = diagnose(record(sound(seed=seed).tables, SETTINGS))
    assert {each.severity for each in found} <= {"fine", "note"}
    assert len(found) == len(CHECKS) == len({each.code for each in found})


def test_every_finding_says_where_its_number_comes_from(healthy: Any, record: Record) -> None:
    for found in diagnose(record(healthy.tables, SETTINGS)):
        assert found.title and found.signature and found.measured and found.threshold and found.source
        assert bool(found.decide) or found.confidence != "inconclusive"


def test_the_worst_comes_first(healthy: Any, record: Record) -> None:
    healthy.values("adapter_weights", "norm_step")[:] = 0
    assert diagnose(record(healthy.tables, SETTINGS))[0].code == "untrained"


def test_evidence_is_plain_json(healthy: Any, record: Record) -> None:
    for found in diagnose(record(healthy.tables, SETTINGS)):
        assert json.loads(json.dumps(asdict(found)))["code"] == found.code


def test_an_empty_recording_decides_nothing(record: Record) -> None:
    found = diagnose(record({}))
    assert {each.confidence for each in found} == {"inconclusive"}
    assert all(each.severity == "note" and each.decide for each in found)


@pytest.mark.parametrize("missing", ["loss", "evaluation", "divergence", "base_weights", "adapter_weights", "spectra"])
def test_a_missing_table_is_no_error_and_no_accusation(healthy: Any, record: Record, missing: str) -> None:
    del healthy.tables[missing]
    assert {each.severity for each in diagnose(record(healthy.tables))} <= {"fine", "note"}


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12])
def test_a_run_of_a_few_steps_is_no_error_and_no_accusation(healthy: Any, record: Record, steps: int) -> None:
    short = {
        name: (at[:steps], {measure: values[:steps] for measure, values in columns.items()})
        for name, (at, columns) in healthy.tables.items()
    }
    assert {each.severity for each in diagnose(record(short, SETTINGS))} <= {"fine", "note"}


def test_columns_of_nan_are_no_error_and_no_accusation_but_that_they_are_not_finite(
    healthy: Any, record: Record
) -> None:
    for _, columns in healthy.tables.values():
        for values in columns.values():
            values[:] = np.nan
    found = diagnose(record(healthy.tables, SETTINGS))
    assert [each.code for each in found if each.severity in ("problem", "warning")] == ["nonfinite"]


def test_the_page_has_a_row_for_every_finding(record: Record) -> None:
    page = PAGE.read_text()
    for found in diagnose(record({})):
        assert f"| `{found.code}` |" in page, found.code
