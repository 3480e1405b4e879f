"""A tracker of one's own gets what happened, in order, once: beside the loop, from the courier, and by sync."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from training_lens import TrainingWrapper
from training_lens.errors import ConfigurationError
from training_lens.integrations.send_run import read_delivery_states, send_run
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder

OWN = '''
import json
from pathlib import Path
from training_lens.errors import IntegrationError
from training_lens.integrations import Tracker

class Notes(Tracker):
    """Appends what it gets to a file; refuses while the file `closed` is there."""

    name = "notes"

    def require(self): pass

    def open(self): self._say(opened=self.run.run_id)

    def log(self, records):
        if (Path(self.options["folder"]) / "closed").exists():
            raise IntegrationError("It is closed.", lasting=True)
        for record in records:
            self._say(kind=record.kind, step=record.step, scalars=record.scalars)

    def end(self): self._say(ended=self.run.status)

    def _say(self, **values):
        with open(Path(self.options["folder"]) / "notes.jsonl", "a") as file:
            file.write(json.dumps(values) + "\\n")
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a tracker's module, which is the current one."""
    (tmp_path / "own_tracker.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("own_tracker", None)


def notes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]


def config_of(small_config: Callable[..., Any], own: Path, **tracking: Any) -> Any:
    custom = {"own_tracker.Notes": {"folder": str(own)}}
    return small_config(tracking={"custom": custom, "wait_seconds": 60, **tracking}, training={"logging_steps": 2})


def check_complete(run: RunFolder, told: list[dict[str, Any]]) -> None:
    lines = {(line["kind"], line["step"]): line for line in read_metrics(run.metrics_file)}
    records = {(note["kind"], note["step"]): note["scalars"] for note in told if "kind" in note}
    assert list(records) == [("base", 0), ("step", 1), ("step", 2), ("step", 4), ("step", 6), ("validation", 6)]
    assert len(records) == sum("kind" in note for note in told)
    for key, scalars in records.items():
        assert scalars["train/loss" if key[0] == "step" else "validation/loss"] == lines[key]["loss"]
    assert told[-1] == {"ended": "finished"}


def joined(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two processes sent; the second begins with the piece that the first sent and was killed before it knew."""
    before, after = ([note for note in notes if "opened" not in note] for notes in (before, after))
    twice = next(n for n in range(len(before), -1, -1) if before[len(before) - n :] == after[:n])
    return [*before, *after[twice:]]


def test_the_courier_sends_a_run_to_a_class_of_ones_own(small_config: Callable[..., Any], own: Path) -> None:
    run = RunFolder(Path(TrainingWrapper(config_of(small_config, own)).train().run_dir))
    check_complete(run, notes(own))
    assert [state.status for state in read_delivery_states(run)] == ["delivered"]


@pytest.mark.slow
def test_a_class_in_python_is_served_beside_the_loop(small_config: Callable[..., Any], own: Path) -> None:
    from training_lens.integrations import Record, RunRecord, Tracker

    got: list[Any] = []

    class Here(Tracker):
        name = "here"

        def require(self) -> None: ...

        def open(self) -> None:
            got.append({"opened": self.run.run_id})

        def log(self, records: Any) -> None:
            got.extend({"kind": r.kind, "step": r.step, "scalars": r.scalars} for r in records)

        def end(self) -> None:
            got.append({"ended": self.run.status})

    assert Record and RunRecord
    config = small_config(training={"logging_steps": 2})
    run = RunFolder(Path(TrainingWrapper(config, integrations=(Here,)).train().run_dir))
    check_complete(run, got)


@pytest.mark.slow
def test_what_was_not_sent_goes_out_by_sync_once(small_config: Callable[..., Any], own: Path) -> None:
    (own / "closed").touch()
    run = RunFolder(Path(TrainingWrapper(config_of(small_config, own)).train().run_dir))
    assert all("kind" not in note for note in notes(own))
    assert "lines of its journals, its end (It is closed). It is kept: " in (run.logs / "run.log").read_text()
    (state,) = read_delivery_states(run)
    assert state.outstanding == "8 lines of its journals, its end"
    (own / "closed").unlink()
    assert [state.status for state in send_run(run)] == ["delivered"]
    check_complete(run, [note for note in notes(own) if "opened" not in note])
    before = notes(own)
    assert [state.status for state in send_run(run)] == ["delivered"]
    assert notes(own) == before


@pytest.mark.slow
def test_a_run_sent_to_a_tracker_that_it_did_not_know(small_config: Callable[..., Any], own: Path) -> None:
    run = RunFolder(Path(TrainingWrapper(small_config(training={"logging_steps": 2})).train().run_dir))
    send_run(run, {"tracking": {"custom": {"own_tracker.Notes": {"folder": str(own)}}}})
    check_complete(run, notes(own)[1:])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("own_tracker", "give module.Class"),
        ("own_tracker.Note", "has no attribute 'Note'"),
        ("no_such_module.Notes", "No module named 'no_such_module'"),
        ("own_tracker.Path", "is no Tracker"),
    ],
)
def test_a_class_that_is_none_is_found_before_anything_starts(
    small_config: Callable[..., Any], own: Path, place: str, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        TrainingWrapper(small_config(tracking={"custom": {place: {}}})).train()
    assert not (own / "outputs" / "experiments").exists()


@pytest.mark.slow
def test_a_killed_courier_changes_no_bit_and_is_said(
    small_config: Callable[..., Any], own: Path, couriers_of: Callable[..., list[int]]
) -> None:
    from training_lens.training.loop.callbacks import Callback

    class KillsTheCourier(Callback):
        def on_step_end(self, trainer: Any, report: Any) -> None:
            if report.step == 3:
                for pid in couriers_of():
                    os.kill(pid, 9)

    plain = RunFolder(Path(TrainingWrapper(small_config(training={"logging_steps": 2})).train().run_dir))
    config = config_of(small_config, own)
    run = RunFolder(Path(TrainingWrapper(config, callbacks=(KillsTheCourier(),)).train().run_dir))
    weights = "adapter_model.safetensors"
    assert (run.adapter / weights).read_bytes() == (plain.adapter / weights).read_bytes()
    assert f"training-lens sync {run.root}" in (run.logs / "run.log").read_text()
    sent = notes(own) if (own / "notes.jsonl").exists() else []
    assert [state.status for state in send_run(run)] == ["delivered"]
    check_complete(run, joined(sent, notes(own)[len(sent) :]))
