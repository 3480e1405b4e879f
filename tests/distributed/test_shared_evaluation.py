"""An evaluation on two processes has the numbers and the answers of one."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import fork, fork_processes, join_processes  # type: ignore[import-not-found]

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.utils.integrity import CHECKSUM

Config = Callable[..., TrainingConfig]


def evaluate(folder: Path) -> None:
    """`training-lens evaluate` of a run."""
    from training_lens.cli import main

    settings = ["evaluation.max_examples=7", "evaluation.max_new_tokens=8", "evaluation.resamples=50"]
    sys.argv = ["training-lens", "evaluate", "--run", str(folder), *settings]
    main()


def approximate(value: Any) -> Any:
    """A JSON value whose numbers equal others up to rounding."""
    if isinstance(value, dict):
        return {key: approximate(part) for key, part in value.items()}
    if isinstance(value, list):
        return [approximate(part) for part in value]
    return pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value


def test_two_processes_evaluate_as_one_does(small_config: Config) -> None:
    run = Path(TrainingWrapper(small_config(training={"max_steps": 2})).train().run_dir)
    reports = []
    for start in (lambda: [fork(evaluate, run)], lambda: fork_processes(2, evaluate, run)):
        assert set(join_processes(start())) == {0}
        reports.append({name: (run / "reports" / name).read_text() for name in ("evaluation.json", "evaluation.csv")})
        for name in reports[-1]:
            (run / "reports" / name).unlink()
    alone, both = reports
    found, wanted = (json.loads(part["evaluation.json"]) for part in (both, alone))
    assert wanted["endings"]
    for own in (found, wanted):
        own.pop(CHECKSUM)
    assert found == approximate(wanted)
    answers = [
        [row["adapter_answer"] for row in csv.DictReader(part["evaluation.csv"].splitlines())] for part in reports
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 7
    assert len((run / "logs/evaluations.jsonl").read_text().splitlines()) == 2, "the first process alone records"
