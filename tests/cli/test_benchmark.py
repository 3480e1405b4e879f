"""`training-lens benchmark`: a table, one JSON object, and the same in the run's reports."""

from __future__ import annotations

import json
from collections.abc import Callable

from click.testing import Result

from training_lens.runs.run_folder import RunFolder

Call = Callable[..., Result]
QUICK = ["benchmark.batch_sizes=[1,2]", "benchmark.prompt_lengths=[8]", "benchmark.new_tokens=2"]
QUICK += ["benchmark.repetitions=1", "benchmark.warmup=0"]


def test_table_json_and_reports_agree(call: Call, own_run: RunFolder) -> None:
    result = call("benchmark", "--run", str(own_run.root), *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed == json.loads((own_run.reports / "benchmark.json").read_text())
    assert [(c["model"], c["batch_size"]) for c in printed["cells"]] == [
        (model, rows) for rows in (1, 2) for model in ("base", "adapter", "merged")
    ]
    assert all(c["speed"]["tokens_per_second"] > 0 for c in printed["cells"])
    assert "tok/s" in result.stderr and "merged" in result.stderr
    assert "Time to first token" in (own_run.reports / "benchmark.html").read_text()


def test_settings_of_the_run_are_refused(call: Call, finished_run: RunFolder) -> None:
    result = call("benchmark", "--run", str(finished_run.root), "training.lr=1", *QUICK)
    assert result.exit_code == 2
    assert "training.lr=1: benchmark measures with the run's own config. It takes benchmark." in result.stderr


def test_problems_of_the_settings_are_named(call: Call) -> None:
    result = call("benchmark", "benchmark.batch_sizes=[4,4]", "benchmark.new_tokens=1")
    assert result.exit_code == 2
    assert "benchmark.batch_sizes: [4, 4] names one of them twice" in result.stderr
    assert "benchmark.new_tokens" in result.stderr
