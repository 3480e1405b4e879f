"""Runs are read, sorted and compared by their files alone; a broken one is told, and stops nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.metrics_log import read_logged_values, read_metrics
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.runs.run_listing import (
    RunOverview,
    best_run,
    config_differences,
    find_runs,
    have_same_validation,
    lower_is_better,
    read_run,
    read_runs,
    sort_runs,
)
from training_lens.utils.files import write_json


def make(base: Path, run_id: str, *, experiment: str = "default", config: Any = None, **summary: Any) -> RunFolder:
    run = RunFolder(runs_folder(str(base), experiment) / run_id).create()
    write_json(run.metadata / "config.json", {"output": {"run_id": run_id}, **(config or {})})
    write_json(run.metadata / "summary.json", {"status": "finished", **summary})
    return run


def ids(runs: Any) -> list[str]:
    return [run.run_id for run in runs]


def test_every_experiment_is_read_the_newest_first(tmp_path: Path) -> None:
    for experiment, run_id in [("b", "20260102T000000Z-aaaa"), ("a", "20260103T000000Z-aaaa")]:
        make(tmp_path, run_id, experiment=experiment)
    make(tmp_path, "now", experiment="a")  # no timestamp: as old as its files
    assert ids(read_runs(str(tmp_path))) == ["now", "20260103T000000Z-aaaa", "20260102T000000Z-aaaa"]
    (only,) = read_runs(str(tmp_path), "b")
    assert (only.experiment_name, only.start_time.isoformat()) == ("b", "2026-01-02T00:00:00+00:00")
    assert read_runs(str(tmp_path / "nowhere")) == []
    with pytest.raises(ConfigurationError, match=r"no experiment 'bb' in .*: there are a, b\. Did you mean 'b'\?"):
        read_runs(str(tmp_path), "bb")


def test_metrics_are_the_finite_numbers_of_summary_and_reports(tmp_path: Path) -> None:
    run = make(tmp_path, "a", steps=3, train_loss=float("nan"), note="x", estimate={"seconds": 2.5})
    write_json(run.reports / "compare.json", {"adapter": {"exact_match": 0.25}, "done": True, "by_length": [{"n": 1}]})
    assert read_run(run).metrics == {"steps": 3, "estimate.seconds": 2.5, "adapter.exact_match": 0.25}


def test_of_two_reports_the_newer_one_stands_and_the_summary_over_both(tmp_path: Path) -> None:
    run = make(tmp_path, "a", steps=3, seconds=2.5)
    for age, (name, score) in enumerate([("compare.json", 0.25), ("evaluation.json", 0.5)]):
        write_json(run.reports / name, {"steps": 99, "adapter": {"exact_match": score}, "settings": {"seed": age}})
        os.utime(run.reports / name, (1000 - age, 1000 - age))
    expected = {"steps": 3, "seconds": 2.5, "adapter.exact_match": 0.25}
    assert read_run(run).metrics == expected
    os.utime(run.reports / "evaluation.json")
    assert read_run(run).metrics == {**expected, "adapter.exact_match": 0.5}


ODD = [
    '{"kind": "step", "step": 3}',
    '{"kind": "step", "step": "4", "loss": null, "seconds": NaN}',
    '{"kind": "validation", "step": 3, "loss": "low"}',
    '{"kind": "base", "step": 0}',
]


def test_odd_lines_in_one_run_s_log_stop_no_command(tmp_path: Path) -> None:
    make(tmp_path, "good", steps=1)
    run = make(tmp_path, "odd", status="running")
    run.metrics_file.write_text("\n".join(['{"kind": "step", "step": 2, "loss": 8.0, "seconds": 0.5}', *ODD]))
    assert ids(find_runs(["good"], str(tmp_path))) == ["good"]
    assert {found.run_id: found.metrics for found in read_runs(str(tmp_path))} == {
        "good": {"steps": 1},
        "odd": {"steps": 3, "seconds": 0.5},
    }
    assert read_logged_values(run, "step", "step", "loss") == [[2, 8.0]]


def test_only_damaged_lines_are_warned_of_and_the_last_may_be_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, whole = tmp_path / "metrics.jsonl", '{"kind": "step", "step": 1}\n{"kind": "step", "step": 2}\n'
    path.write_text(whole + '{"kind": "ste')
    assert [line["step"] for line in read_metrics(path)] == [1, 2] and not caplog.records
    path.write_text('{"kind": "ste\n' + whole)
    assert [line["step"] for line in read_metrics(path)] == [1, 2] and "its lines 1 are skipped" in caplog.text
    assert "ends at step" not in caplog.text
    read_metrics(path, last_step=3)
    assert "it ends at step 2 of 3" in caplog.text


@pytest.mark.parametrize(
    ("sources", "name"),
    [([], ""), (["a/x.jsonl"], "x.jsonl"), (["a/x.jsonl", "y.jsonl", "z"], "x.jsonl +2"), ([{"q": 1}], "1 rows")],
)
def test_data_is_named_by_its_first_file_and_the_number_of_others(
    tmp_path: Path, sources: list[Any], name: str
) -> None:
    run = make(tmp_path, "a", config={"data": {"train": sources}, "model": {"id": str(tmp_path / "base")}})
    assert (read_run(run).data_name, read_run(run).model_name) == (name, "base")


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        *[(name, True) for name in ("adapter.bits_per_byte", "adapter.forward_kl", "validation_loss", "peak_bytes")],
        *[(name, False) for name in ("adapter.exact_match", "tokens_per_second", "adapter.rougeL", "steps")],
    ],
)
def test_measures_know_which_end_is_best(metric: str, lower: bool) -> None:
    assert lower_is_better(metric) == lower


def test_runs_are_validated_alike_where_files_share_and_seed_are_the_same(tmp_path: Path) -> None:
    def run(name: str, data: Any, val_ratio: float = 0.0) -> RunOverview:
        config = {"data": {"val_ratio": val_ratio}, "training": {"seed": 0}}
        folder = make(tmp_path, name, config=config)
        if data is not None:
            write_json(folder.metadata / "data.json", data)
        return read_run(folder)

    files = {"train": {"files": {"rows.jsonl": "aa"}}}
    one = run("one", {**files, "validation": {"files": {"held.jsonl": "bb"}}})
    moved = run("moved", {"train": {"files": {"x": "cc"}}, "validation": {"files": {"other/held.jsonl": "bb"}}})
    tenth, fifth = run("tenth", files, 0.1), run("fifth", files, 0.2)
    unknown = [run("none", None), run("broken", [])]
    assert have_same_validation([one, moved, *unknown]) and have_same_validation([tenth, tenth])
    assert not have_same_validation([one, tenth]) and not have_same_validation([tenth, fifth])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata/config.json", None, "config.json is missing"),
        ("metadata/config.json", "[]", "config.json holds a list"),
        ("metadata/summary.json", None, "summary.json is missing"),
        ("metadata/summary.json", "{", "summary.json is no valid JSON"),
        ("metadata/summary.json", "3", "summary.json holds no summary"),
    ],
)
def test_a_run_without_config_or_summary_is_broken_and_says_why(
    tmp_path: Path, name: str, content: str | None, reason: str
) -> None:
    make(tmp_path, "good", steps=1)
    path = make(tmp_path, "bad").root / name
    path.unlink() if content is None else path.write_text(content)
    found = {run.run_id: run for run in read_runs(str(tmp_path))}
    assert found["bad"].status == "broken" and reason in found["bad"].detail
    assert found["good"].status == "finished" and found["good"].detail == ""


@pytest.mark.parametrize("name", ["reports/compare.json", "metadata/tags.json"])
def test_a_broken_report_or_tag_file_is_told_beside_the_status(tmp_path: Path, name: str) -> None:
    run = make(tmp_path, "a", steps=1)
    (run.root / name).write_text('"')
    told = read_run(run)
    assert told.status == "finished" and told.metrics == {"steps": 1} and "is no valid JSON" in told.detail


def test_a_run_that_died_says_which_process_it_was(tmp_path: Path) -> None:
    run = make(tmp_path, "a", status="running")
    write_json(run.metadata / "process.json", {"pid": 4711, "host": "forge"})
    assert (read_run(run).status, read_run(run).detail) == ("interrupted", "died, process 4711 on host forge")


def test_a_run_without_its_summary_has_the_numbers_of_its_steps(tmp_path: Path) -> None:
    run = make(tmp_path, "a", status="running", steps=0, seconds=0.0)
    run.metrics_file.write_text(
        '{"kind": "base", "step": 0, "loss": 9.0}\n{"kind": "step", "step": 1, "loss": 8.0, "seconds": 0.5}\n'
        '{"kind": "validation", "step": 1, "loss": 3.0}\n{"kind": "step", "step": 2, "loss": 7.0, "seconds": 0.5}\n'
    )
    expected = {"steps": 2, "seconds": 1.0, "base_validation_loss": 9.0, "validation_loss": 3.0}
    assert read_run(run).metrics == expected
    with run.hold_lock():
        assert read_run(run).metrics == expected


def test_runs_are_sorted_by_any_metric_the_best_first_those_without_it_last(tmp_path: Path) -> None:
    make(tmp_path, "a", validation_loss=2.0, score=0.5)
    make(tmp_path, "b", validation_loss=1.0, score=0.1)
    make(tmp_path, "c", status="failed")
    runs = read_runs(str(tmp_path))
    assert ids(sort_runs(runs, "validation_loss")) == ["b", "a", "c"]
    assert ids(sort_runs(runs, "score")) == ["a", "b", "c"]
    assert ids(sort_runs(runs, "score", ascending=True)) == ["b", "a", "c"]
    assert best_run(runs, "score").run_id == "a" and best_run(runs, "score", ascending=True).run_id == "b"
    with pytest.raises(ConfigurationError, match=r"'scor': none of the 3 runs .* score, .*Did you mean 'score'\?"):
        sort_runs(runs, "scor")


def test_the_best_run_is_a_finished_one(tmp_path: Path) -> None:
    make(tmp_path, "a", validation_loss=2.0)
    make(tmp_path, "b", validation_loss=1.0, status="failed")
    assert best_run(read_runs(str(tmp_path)), "validation_loss").run_id == "a"


def test_only_settings_that_differ_are_told(tmp_path: Path) -> None:
    make(tmp_path, "a", config={"peft": {"r": 4, "rank_pattern": {"q_proj": 8}}, "training": {"lr": 0.1}})
    make(tmp_path, "b", config={"peft": {"r": 8}, "training": {"lr": 0.1}})
    runs = find_runs(["a", "b"], str(tmp_path))
    found = config_differences([*runs, runs[0]])
    assert found == {"peft.r": (4, 8, 4), "peft.rank_pattern.q_proj": (8, None, 8)}


def test_runs_are_found_in_any_experiment_by_id_path_and_latest(tmp_path: Path) -> None:
    make(tmp_path, "20260101T000000Z-aaaa", experiment="a")
    newest = make(tmp_path, "20260102T000000Z-aaaa", experiment="b", status="failed")
    assert ids(find_runs(["latest", str(newest.root), newest.run_id], str(tmp_path))) == [newest.run_id]
    make(tmp_path, "same", experiment="a")
    same = make(tmp_path, "same", experiment="b")
    with pytest.raises(CheckpointError, match="'same' may mean 2 runs; give the folder of one"):
        find_runs(["same"], str(tmp_path))
    assert find_runs([str(same.root)], str(tmp_path))[0].experiment_name == "b"
    with pytest.raises(CheckpointError, match=r"no run 'sane' in .* \(4 runs in all\).*Did you mean 'same'\?"):
        find_runs(["sane"], str(tmp_path))
