"""The pages' values are those of the runs' files, stay up to date, and are read fast however many or long runs are."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient
from ui.run_factory import step_line, write_run

from training_lens.analysis.page.run_feed import CURVES, RunFeed
from training_lens.analysis.page.run_page import describe_progress
from training_lens.analysis.page.run_row import SPARK_POINTS, read_run_row
from training_lens.runs.run_folder import PROCESS
from training_lens.ui.app import build_app
from training_lens.ui.guard import Access
from training_lens.ui.run_index import RunIndex
from training_lens.ui.web import Outputs
from training_lens.utils.integrity import seal_line

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def own_outputs(finished_run: Any, tmp_path: Path) -> Path:
    """A folder of runs with a copy of the finished one."""
    outputs = tmp_path / "outputs"
    shutil.copytree(finished_run.root, outputs / "experiments/default/runs" / finished_run.run_id)
    return outputs


def client_of(outputs: Path) -> TestClient:
    return TestClient(build_app(Outputs(outputs), Access(8000)), base_url="http://127.0.0.1:8000")


def test_a_run_is_listed_with_the_numbers_of_its_summary(finished_run: Any, own_outputs: Path) -> None:
    listed = client_of(own_outputs).get("/api/runs").json()
    (row,) = listed["changed"]
    summary = json.loads((finished_run.metadata / "summary.json").read_text())
    assert (row["status"], row["steps"], row["loss"]) == ("finished", summary["steps"], summary["validation_loss"])
    assert row["base_loss"] == summary["base_validation_loss"] and row["verdict"]["outcome"] == "better"
    assert (listed["pending"], listed["total"], listed["removed"]) == (0, 1, [])


def test_only_what_changed_is_sent_again_and_what_is_gone_is_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "default", name) for name in ("one", "two", "three")]
    index = RunIndex(tmp_path)
    first = index.read_changes(0)
    assert {row["run"] for row in first["changed"]} == {"one", "two", "three"}
    assert index.read_changes(first["version"])["changed"] == []
    (runs[0].metadata / "tags.json").write_text(json.dumps(["good"]))
    shutil.rmtree(runs[1].root)
    second = index.read_changes(first["version"])
    assert [(row["run"], row["tags"]) for row in second["changed"]] == [("one", ("good",))]
    assert second["removed"] == [["default", "two"]] and second["total"] == 2


def test_a_run_whose_files_are_broken_is_listed_with_the_reason(tmp_path: Path) -> None:
    write_run(tmp_path, "default", "whole")
    broken = write_run(tmp_path, "default", "broken")
    (broken.metadata / "summary.json").write_text("{")
    (write_run(tmp_path, "default", "empty").metadata / "config.json").unlink()
    rows = {row["run"]: row for row in RunIndex(tmp_path).read_changes(0)["changed"]}
    assert rows["whole"]["status"] == "finished" and rows["broken"]["status"] == rows["empty"]["status"] == "broken"
    assert "summary.json" in rows["broken"]["detail"]


def test_many_runs_come_in_parts_the_newest_first(tmp_path: Path) -> None:
    names = [f"20260101T0000{number:02d}Z-aaaa" for number in range(12)]
    for name in names:
        write_run(tmp_path, "default", name, steps=2)
    index, found, version = RunIndex(tmp_path), list[str](), 0
    for _ in names:  # each request reads at least one
        part = index.read_changes(version, seconds=0.0)
        version = part["version"]
        found += [row["run"] for row in part["changed"]]
        assert len(found) + part["pending"] == part["total"] == 12
    assert found == names[::-1] and part["pending"] == 0


def test_the_row_of_a_long_run_is_read_from_parts_of_its_log(tmp_path: Path) -> None:
    run = write_run(tmp_path, "default", "long", steps=5000, status="running")
    row = read_run_row(run)
    assert (row.steps, row.total_steps, row.loss, row.base_loss) == (5000, 5000, 1.0, 3.0)
    assert len(row.spark) == SPARK_POINTS and list(row.spark) == sorted(row.spark, reverse=True)
    assert row.status == "interrupted" and "died" in row.detail


def test_curves_keep_the_extremes_of_every_step(tmp_path: Path) -> None:
    run = write_run(tmp_path, "default", "spiky", steps=0)
    losses = np.random.default_rng(0).random(4000)
    losses[[17, 1234, 3999]] = [50.0, -3.0, 70.0]
    with run.metrics_file.open("w") as file:
        for step, loss in enumerate(losses.tolist(), 1):
            file.write(seal_line({**step_line(step, 4000), "loss": None if step == 100 else loss}) + "\n")
    found = client_of(tmp_path).get("/api/runs/default/spiky/curves?points=200").json()
    steps, values = found["curves"]["loss"]
    assert len(steps) <= 200 and {50.0, -3.0, 70.0} <= set(values) and None in values
    assert (steps[0], steps[-1], found["last_step"]) == (1, 4000, 4000)
    near = client_of(tmp_path).get("/api/runs/default/spiky/curves?points=200&first=10&last=40").json()
    assert near["curves"]["loss"] == [list(range(10, 41)), losses[9:40].tolist()]


def test_a_feed_that_grew_equals_one_that_was_read_at_once(tmp_path: Path) -> None:
    run = write_run(tmp_path, "default", "grows", steps=12_000)
    lines = run.metrics_file.read_bytes()
    feed = RunFeed(run)
    for end in (0, 10, 1000, 1001, 20_000, 500_000, len(lines)):  # also within a line, and with many lines at once
        run.metrics_file.write_bytes(lines[:end])
        feed.refresh()
    whole = RunFeed(run).refresh()
    assert feed.columns == whole.columns and feed.validations == whole.validations and whole.last_step == 12_000
    assert set(whole.thin_curves(100)) == {*CURVES, "loss_mean"}


def test_the_mean_of_neighbours_leaves_out_what_is_not_finite() -> None:
    from training_lens.analysis.page.run_feed import average_neighbors

    values = np.arange(100.0)
    values[50] = np.nan
    mean = average_neighbors(values)
    assert mean[10] == pytest.approx(10) and mean[50] == pytest.approx(50) and math.isfinite(mean[0])
    assert len(average_neighbors(values[:20])) == 0


def read_events(url: str, count: int, since: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first events of a run's stream: their kind and values."""
    with httpx.stream("GET", f"{url}?since={since}", timeout=20) as response:
        kind = "message"
        for line in response.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))
                kind, count = "message", count - 1
                if count == 0:
                    return


def test_a_page_that_follows_a_run_gets_its_new_steps_and_its_end(
    tmp_path: Path, start_dashboard: Callable[..., Any]
) -> None:
    run = write_run(tmp_path / "outputs", "default", "live", steps=5, status="running")
    dashboard = start_dashboard(tmp_path / "outputs")

    def go_on() -> None:
        with run.metrics_file.open("a") as file:
            file.write(seal_line(step_line(6, 6)) + "\n")

    with run.hold_lock():
        events = read_events(f"{dashboard.url}/api/runs/default/live/events", 4, since=3)
        _, first = next(events)
        assert first["status"] == "running" and first["steps"]["step"] == [4, 5] and first["page"]
        threading.Timer(0.2, go_on).start()
        _, second = next(events)
        assert second["steps"]["step"] == [6] and second["validations"] == []
        assert second["progress"]["step"] == 6 and not second["page"]  # nothing else of the page is read again
    _, third = next(events)
    assert third["status"] == "interrupted" and third["page"]
    threading.Timer(0.2, shutil.rmtree, (run.root,)).start()
    kinds = [kind for kind, _ in events]
    assert kinds[-1] == "gone"


def test_names_and_texts_of_a_run_are_data(finished_run: Any, tmp_path: Path) -> None:
    """They arrive as JSON texts; that the page shows them as text is the browser's test."""
    run = write_run(tmp_path, f"a {EVIL} b".replace("/", ""), "one")
    (run.metadata / "tags.json").write_text(json.dumps([EVIL]))
    client = client_of(tmp_path)
    response = client.get("/api/runs")
    assert response.headers["content-type"] == "application/json" and response.json()["changed"][0]["tags"] == [EVIL]
    page = client.get(f"/api/runs/{run.experiment_name}/one")
    assert page.status_code == 200 and page.json()["row"]["experiment"] == run.experiment_name


def test_the_page_of_a_run_has_what_its_files_have(finished_run: Any, own_outputs: Path) -> None:
    client, path = client_of(own_outputs), f"/api/runs/default/{finished_run.run_id}"
    page = client.get(path).json()
    assert page["headline"]["verdict"]["outcome"] == "better" and page["headline"]["phrase"].startswith("Better than")
    assert page["row"] == json.loads(json.dumps(asdict(read_run_row(finished_run))))
    (sample, *_) = page["samples"]
    assert {answer["base"] for answer in sample["answers"]} == {True, False} and sample["prompt"]
    assert (page["data"][0]["rows"], page["data"][0]["used"], page["evaluation"]) == (2100, 64, None)
    names = {file["name"] for file in page["files"]}
    assert {"metadata/config.json", "logs/metrics.jsonl", "artifacts/adapter/adapter_model.safetensors"} <= names
    for name in ("metadata/config.json", "artifacts/adapter/adapter_model.safetensors"):
        assert client.get(f"{path}/files/{name}").content == (finished_run.root / name).read_bytes()
    log = (finished_run.logs / "run.log").read_text()
    assert client.get(f"{path}/log").json()["text"] == log and log


def test_what_the_lens_saw_is_that_of_the_analysis(finished_run: Any, own_outputs: Path) -> None:
    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer

    client, path = client_of(own_outputs), f"/api/runs/default/{finished_run.run_id}"
    analyzer = CheckpointAnalyzer(finished_run.root)
    found = client.get(f"{path}/findings").json()
    assert [each["code"] for each in found["findings"]] == [each.code for each in analyzer.analyze().findings]
    layers = client.get(f"{path}/layers?measure=strength&by=layer").json()
    series = analyzer.evolution("strength", by="layer")
    assert layers["steps"] == series.steps.tolist()
    assert np.allclose(np.array(layers["values"], float), series.values.T, equal_nan=True)
    assert client.get(f"{path}/layers?by=nothing").status_code == 400
    assert client.get(f"{path}/layers?measure=nothing").status_code == 400
    assert set(client.get(f"{path}/spectra").json()["kinds"]) == {module.kind for module in analyzer.recording.modules}


def test_runs_side_by_side_show_what_differs(finished_run: Any, own_outputs: Path) -> None:
    other = write_run(own_outputs, "default", "other")
    client = client_of(own_outputs)
    query = f"run=default/{finished_run.run_id}&run=default/{other.run_id}"
    found = client.get(f"/api/compare?{query}").json()
    assert [run["row"]["run"] for run in found["runs"]] == [finished_run.run_id, "other"]
    assert {"key": "peft.r", "values": [16, 8]} in found["differences"]
    layers = client.get(f"/api/compare/layers?{query}").json()
    assert layers["runs"][0]["step"] and layers["runs"][1]["step"] is None and "reason" in layers["similarity"]
    assert client.get("/api/compare?run=default/other").status_code == 400
    assert client.get("/api/compare?run=default/other&run=default/gone").status_code == 404


def test_a_run_of_another_version_or_with_odd_values_has_a_page(tmp_path: Path) -> None:
    """Lines without an epoch or with a text for a number, samples that are none, a comparison without its groups."""
    run = write_run(tmp_path, "default", "old", steps=3)
    lines = [{"kind": "step", "step": step, "loss": loss} for step, loss in enumerate([2.0, "x", None], 1)]
    lines += [{"kind": "step", "step": 4, "epoch": "a", "loss": 1.0}, {"kind": "validation", "step": 4, "loss": "low"}]
    run.metrics_file.write_text("".join(seal_line(line) + "\n" for line in lines))
    run.samples_file.write_text(seal_line({"step": 4, "samples": ["x", None, {"id": 1}]}) + "\n")
    (run.reports / "compare.json").write_text(json.dumps({"base": {"loss": 2.0}, "adapter": {"loss": 1.0}}))
    client = client_of(tmp_path)
    page = client.get("/api/runs/default/old").json()
    assert page["progress"]["step"] == 4 and page["events"]["epochs"] == [] and len(page["samples"]) == 1
    assert page["evaluation"]["by_length"] == [] and client.get("/api/runs").json()["changed"][0]["run"] == "old"
    assert client.get("/api/runs/default/old/curves").json()["curves"]["loss"][1] == [2.0, None, None, 1.0]


def test_a_run_that_resumes_is_starting_until_its_first_step_and_says_what_it_does(tmp_path: Path) -> None:
    run = write_run(tmp_path, "default", "one", steps=5, status="running")
    now = int(time.time())
    lines = [(now - 60, "the run ends: stopped after step 5"), (now + 1, "the adapter takes 35 modules")]

    def write_log(count: int) -> None:
        dated = ((datetime.fromtimestamp(at, UTC), text) for at, text in lines[:count])
        (run.logs / "run.log").write_text("".join(f"{at:%Y-%m-%dT%H:%M:%SZ} INFO {text}\n" for at, text in dated))

    with run.hold_lock():
        shown = []
        for count in (1, 2):
            write_log(count)
            progress = describe_progress(run, RunFeed(run).refresh(), {})
            shown.append((progress["is_starting"], progress["doing"]))
        with run.metrics_file.open("a") as file:
            file.write(seal_line({**step_line(6, 6), "time": now + 2.0}) + "\n")
        assert not describe_progress(run, RunFeed(run).refresh(), {})["is_starting"]
    assert shown == [(True, ""), (True, "the adapter takes 35 modules")]


def test_the_time_between_a_stop_and_a_resume_is_no_training_time(tmp_path: Path) -> None:
    run = write_run(tmp_path, "default", "one", steps=10)
    day, now = 86_400.0, time.time()
    with run.hold_lock(), run.metrics_file.open("a") as file:
        for step in range(11, 16):
            file.write(seal_line({**step_line(step, 20), "time": now + day + 2.0 * step}) + "\n")
    os.utime(run.metadata / PROCESS, (now + day, now + day))
    feed = RunFeed(run).refresh()
    assert feed.measure_speed()["step_seconds"] > day
    assert describe_progress(run, feed, {"training.max_steps": 20})["remaining_seconds"] == pytest.approx(10.0)
