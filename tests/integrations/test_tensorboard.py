"""TensorBoard's own readers find in its events what the run's journals hold, once, whatever was killed when."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as LiveAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.util.tensor_util import make_ndarray

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.integrations.record import RunRecord
from training_lens.integrations.send_run import read_delivery_states, send_run
from training_lens.integrations.tensorboard import TensorBoardIntegration
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import read_json, write_json

ROWS = [{"question": f"Where is box {i}?", "answer": f"In *hall* {i}.", "domain": "ab"[i % 2]} for i in range(24)]
SETTINGS: dict[str, Any] = {
    "data": {"train": ROWS, "val_ratio": 0.25},
    "training": {"max_steps": 6, "batch_size": 3, "lr": 3e-3, "logging_steps": 2, "save_steps": 2},
    "peft": {"r": 4},
    "lens": {"enabled": False},
    "tracking": {"samples": 2, "sample_tokens": 4, "histograms_every": 4},
}
ALL = {"scalars": 0, "tensors": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run, shown in TensorBoard."""
    output = {"base_output_dir": str(tmp_path_factory.mktemp("outputs"))}
    return RunFolder(Path(TrainingWrapper(TrainingConfig(**SETTINGS, output=output)).train().run_dir))


def read(run: RunFolder) -> EventAccumulator:
    return EventAccumulator(str(run.logs), size_guidance=ALL).Reload()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_scalars(run: RunFolder) -> None:
    """Every scalar of every due line stands there once, at the time of the line."""
    events, expected = read(run), {}
    due = [v for v in read_metrics(run.metrics_file) if v["kind"] != "step" or v["step"] == 1 or v["step"] % 2 == 0]
    for line in due:
        losses = {f"validation/loss_{domain}": loss for domain, loss in line.get("by_domain", {}).items()}
        found = {f"train/{name}": line.get(name) for name in ("loss", "grad_norm", "lr", "epoch")}
        for tag, value in (found if line["kind"] == "step" else losses | {"validation/loss": line["loss"]}).items():
            expected.setdefault(tag, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in expected}
    assert shown == expected and len(shown) >= 5


def test_scalars_are_the_lines_of_metrics(run: RunFolder) -> None:
    check_scalars(run)
    losses = read(run).Scalars("train/loss")
    times = [
        line["time"]
        for line in read_metrics(run.metrics_file)
        if line["step"] in (1, 2, 4, 6) and line["kind"] == "step"
    ]
    assert [event.wall_time for event in losses] == times


def test_histograms_are_the_lines_of_the_journal(run: RunFolder) -> None:
    events, journal = read(run), lines(run.histograms_file)
    assert [line["step"] for line in journal] == [1, 4, 6]
    tags = {t for t in events.Tags()["tensors"] if t.startswith("weight")}
    kinds = {"weights": "weights", "weight_gradients": "gradients"}
    assert tags == {f"{group}/{n}" for group, kind in kinds.items() for n in journal[0]["histograms"][kind]}
    assert len(tags) > 20
    for tag in tags:
        group, name = tag.split("/")
        assert events.SummaryMetadata(tag).plugin_data.plugin_name == "histograms"
        for event, line in zip(events.Tensors(tag), journal, strict=True):
            expected, shown = line["histograms"][kinds[group]][name], make_ndarray(event.tensor_proto)
            assert event.step == line["step"] and shown[:, 2].tolist() == expected["counts"]
            assert (shown[0, 0], shown[-1, 1]) == (expected["low"], expected["high"])


def test_samples_show_the_base_beside_the_adapter(run: RunFolder) -> None:
    events, journal = read(run), lines(run.samples_file)
    base, last = (make_ndarray(event.tensor_proto).item().decode() for event in events.Tensors("samples"))
    assert [event.step for event in events.Tensors("samples")] == [0, 6]
    cells = table_cells(last)
    assert table_cells(base)[0] == ["prompt", "expected", "base"]
    assert cells[0] == ["prompt", "expected", "base", "adapter"]
    for row, before, after in zip(cells[1:], journal[0]["samples"], journal[1]["samples"], strict=True):
        assert row == [after["prompt"], after["expected"], before["generated"], after["generated"]]


def table_cells(markdown: str) -> list[list[str]]:
    """The texts of a table's cells, as TensorBoard's text page shows them."""
    html = markdown_to_safe_html(markdown)
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    return [[shown(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in rows]


def shown(html: str) -> str:
    """What a browser shows of a cell."""
    text = re.sub(r"<br ?/?>", "\n", html)
    assert "<" not in text, text
    return unescape(text).replace("\N{NO-BREAK SPACE}", " ")


def test_hyperparameters_and_final_losses_are_a_row_of_the_table(run: RunFolder) -> None:
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    events, summary = read(run), run.read_metadata("summary.json")
    about = [events.SummaryMetadata(t) for t in (metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG)]
    start = metadata.parse_session_start_info_plugin_data(about[0].plugin_data.content)
    end = metadata.parse_session_end_info_plugin_data(about[1].plugin_data.content)
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert values["training.lr"] == 3e-3 and values["peft.r"] == 4 and values["model.id"] == "embedded"
    assert values["data.val_ratio"] == 0.25 and not any(name.startswith(("lens.", "output.")) for name in values)
    assert start.group_name == run.run_id and 0 < end.end_time_secs - start.start_time_secs < 600
    assert plugin_data_pb2.SessionEndInfo.DESCRIPTOR and end.status == 1  # success
    for name in ("train_loss", "validation_loss", "base_validation_loss"):
        (event,) = events.Scalars(f"whole_run/{name}")
        assert event.step == 6 and event.value == pytest.approx(summary[name], rel=1e-6)


def tracker(run: RunFolder) -> TensorBoardIntegration:
    return TensorBoardIntegration(RunRecord(run))


@pytest.fixture
def copy(run: RunFolder, tmp_path: Path) -> RunFolder:
    """The run, of which nothing was shown yet."""
    import shutil

    shutil.copytree(run.root, tmp_path / run.run_id, ignore=shutil.ignore_patterns("*tfevents*", "tracking"))
    return RunFolder(tmp_path / run.run_id)


def test_a_kill_between_writing_and_remembering_shows_nothing_twice(copy: RunFolder) -> None:
    first = tracker(copy)
    first.deliver(ended=False)
    cursor = copy.tracking / "tensorboard" / "cursor.json"
    write_json(cursor, {"positions": {**read_json(cursor)["positions"], "metrics": [2, 1]}})
    (events,) = copy.logs.glob("*tfevents*")
    events.write_bytes(events.read_bytes()[:-7])  # the last event is cut short
    live = LiveAccumulator(str(copy.logs), size_guidance=ALL).Reload()
    second = tracker(copy)
    second.deliver(ended=True)
    first.close()
    second.close()
    check_scalars(copy)
    live.Reload()
    assert [e.step for e in live.Tensors("train/loss")] == [1, 2, 4, 6]
    assert [e.step for e in live.Tensors("samples")] == [0, 6]


def test_what_is_shown_already_is_left_alone(copy: RunFolder) -> None:
    assert [state.status for state in send_run(copy)] == ["delivered"]
    before = {path: path.stat().st_mtime_ns for path in copy.logs.glob("*tfevents*")}
    foreign = copy.logs / "events.out.tfevents.1.other"
    foreign.touch()
    assert (
        [state.status for state in send_run(copy)]
        == [state.status for state in read_delivery_states(copy)]
        == ["delivered"]
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 1
    for lost in ("tracking/tensorboard/cursor.json", "logs/*tfevents*.training-lens"):
        next(copy.root.glob(lost)).unlink()
        assert [state.status for state in read_delivery_states(copy)] == ["waiting"]
        send_run(copy)
    assert foreign.exists() and len(list(copy.logs.glob("*tfevents*"))) == 2
    check_scalars(copy)


def test_a_full_disk_is_an_error_of_this_delivery_and_the_next_shows_all(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending, real = tracker(copy), Path.open
    full = lambda path, *args, **kwargs: real(Path("/dev/full"), "wb")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *a, **k: (full if "tfevents" in path.name else real)(path, *a, **k))
        with pytest.raises(OSError, match="No space left"):
            sending.deliver(ended=True)
    sending.deliver(ended=True)
    sending.close()
    check_scalars(copy)


@pytest.mark.slow
def test_sigkill_and_resume_show_each_step_once(tmp_path: Path) -> None:
    config = TrainingConfig(**SETTINGS, output={"base_output_dir": str(tmp_path), "run_id": "killed"})
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump()))
    code = "\n".join(
        [
            "import json, os, sys, time",
            "from training_lens import TrainingConfig, TrainingWrapper",
            "from training_lens.training.loop.callbacks import Callback",
            "class Killed(Callback):",
            "    def on_gradients(self, trainer, step):",
            "        if step == 4:",
            "            time.sleep(0.3)",
            "            os.kill(os.getpid(), 9)",
            "config = TrainingConfig(**json.load(open(sys.argv[1])))",
            "TrainingWrapper(config, callbacks=(Killed(),)).train()",
        ]
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.json")], check=False)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "experiments" / "default" / "runs").iterdir()
    run = RunFolder(folder)
    assert [line["step"] for line in lines(run.histograms_file)] == [1, 4]
    assert TrainingWrapper.resume(run).status == "finished"
    check_scalars(run)
    assert [line["step"] for line in lines(run.histograms_file)] == [1, 4, 6]
    assert [line["step"] for line in lines(run.samples_file)] == [0, 6]
    assert [e.step for e in read(run).Tensors("samples")] == [0, 6]


def test_the_events_are_written_without_torch() -> None:
    code = (
        "import sys; from training_lens.integrations import tensorboard as t; "
        "t._hyperparameter_summary; t._text_value('a', 'b'); "
        "t._histogram_value('g/a', {'low': 0, 'high': 1, 'counts': [1]}); "
        "import tensorboard.plugins.hparams.summary_v2; print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False"]
