"""Sweeps, prepared folders and adapters from elsewhere: nothing of theirs runs, and nothing is written where they say.

Each test plants code and places in every field that could name them, and runs every command that reads such a folder.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from planted import look_at, plant_model, plant_pickles

from training_lens.config.run_config import read_run_config, require_consent
from training_lens.errors import ConfigurationError
from training_lens.integrations.send_run import record_evaluation, send_evaluations
from training_lens.runs.run_folder import RunFolder
from training_lens.training.run import TrainingWrapper
from training_lens.utils.files import read_json, write_json

Call = Callable[..., Result]
ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(32)]
SHORT = ("training.max_steps=1", "training.epochs=1", "tracking.tensorboard=false", "lens.enabled=false")
PLACES = ("output.base_output_dir", "output.mirror", "tracking.mlflow.uri", "prepare.output", "sweep.storage")
BRIEF = "evaluation.max_new_tokens=4"
CODE = ("model.trust_remote_code", "tracking.custom", "evaluation.metrics", "evaluation.task_path")


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the user's, which nothing of others may write in."""
    (folder := tmp_path / "precious").mkdir()
    (folder / "letter").write_text("untouched")
    return folder


@pytest.fixture
def own(write_rows: Callable[..., Path], mark: Path) -> list[str]:
    """The user's own settings of a short training."""
    train, held_out = write_rows(ROWS[:24], "train.jsonl"), write_rows(ROWS[24:], "held_out.jsonl")
    return [f"data.train={train}", f"data.validation={held_out}", *SHORT]


def name_everything(mark: Path, precious: Path) -> dict[str, Any]:
    """A config with code in each key that can name some, and a place of the user's in each that is written."""
    model = mark.parent / "theirs"
    model = model if model.is_dir() else plant_model(model, mark)
    return {
        "model": {"id": str(model), "trust_remote_code": True},
        "evaluation": {"metrics": ["planted_metric.score"], "task_path": str(mark.parent)},
        "tracking": {
            "custom": {"planted_tracker.Planted": {}},
            "mlflow": {"enabled": True, "uri": f"sqlite:///{precious}/mlflow.db"},
            "trackio": {"enabled": True, "folder": str(precious / "trackio")},
        },
        "prepare": {"output": str(precious / "prepared")},
        "sweep": {"storage": f"sqlite:///{precious}/study.db", "space": {"training.lr": [1e-3, 1e-2]}},
        "output": {"base_output_dir": str(precious / "outputs"), "mirror": str(precious / "mirror")},
    }


COMMANDS = (
    ("train",), ("train", "--resume", "latest"), ("validate",), ("prepare",), ("sweep",), ("evaluate",), ("baseline",),
    ("compare",), ("infer", "--input", "train.jsonl", "--output", "answers.jsonl"), ("merge",), ("benchmark",),
    ("sync",), ("push", "latest", "me/it"),
)  # fmt: skip


def refuse_file(
    call: Call, file: Path, mark: Path, precious: Path, commands: Sequence[tuple[str, ...]] = COMMANDS[:2]
) -> None:
    """A config file of others allows nothing."""
    before = look_at(precious)
    for words in commands:
        result = call(*words, "--config", str(file))
        assert result.exit_code == 2, (words, result.output)
        for key in (*CODE, *PLACES):
            assert key in result.stderr, (words, key, result.stderr)
    assert not mark.exists() and look_at(precious) == before


def test_a_sweep_from_elsewhere_runs_no_code_and_writes_nowhere_else(
    call: Call, own: list[str], mark: Path, precious: Path, tmp_path: Path
) -> None:
    settings = [*own, "sweep.space.training.lr=[1e-3,1e-2]", "sweep.trials=1", "sweep.sampler=grid"]
    assert call("sweep", *settings).exit_code == 0
    sweep, runs = tmp_path / "outputs/sweeps/sweep", tmp_path / "outputs/experiments/sweep/runs"
    (trial,) = (RunFolder(path) for path in runs.iterdir() if path.is_dir())
    theirs = name_everything(mark, precious)
    (sweep / "best.yaml").write_text(json.dumps(theirs))
    plant_pickles(sweep, mark)
    config = trial.read_metadata("config.json")
    for section, values in theirs.items():
        config[section] |= {key: value for key, value in values.items() if key != "storage"}
    (trial.metadata / "hashes.json").unlink()
    write_json(trial.metadata / "config.json", config)
    write_json(trial.metadata / "summary.json", {**trial.read_metadata("summary.json"), "status": "interrupted"})
    with sqlite3.connect(sweep / "study.db") as database:  # its process died, and it is to be gone on with
        database.execute("UPDATE trials SET state = 'FAIL'")
        database.execute(
            "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'lock'", (f'"{precious}/letter"',)
        )
        database.execute("UPDATE trial_user_attributes SET value_json = ? WHERE key = 'run_dir'", (f'"{precious}"',))
    before = look_at(precious)
    result = call("sweep", *settings)
    assert "failed: 3 problems" in result.output and "model.trust_remote_code=true" in result.output
    for words in (["report"], ["analyze"], ["sync"], ["train", "--resume"], ["infer", "hi", "--run"], ["doctor"]):
        call(*words, str(trial.root))
    assert not mark.exists() and look_at(precious) == before
    refuse_file(call, sweep / "best.yaml", mark, precious, COMMANDS)


@pytest.mark.parametrize("name", ["workers", "results.lock", "study.db", "leaderboard.json"])
def test_nothing_is_written_through_a_link_in_a_sweep(
    call: Call, own: list[str], precious: Path, tmp_path: Path, name: str
) -> None:
    (sweep := tmp_path / "outputs/sweeps/sweep").mkdir(parents=True)
    target = precious if name == "workers" else precious / "letter"
    (sweep / name).symlink_to(target)
    before = look_at(precious)
    result = call("sweep", *own, "sweep.space.training.lr=[1e-3,1e-2]", "sweep.trials=1")
    assert result.exit_code == 1 and "symbolic link" in result.stderr
    assert look_at(precious) == before


@pytest.mark.slow
def test_what_no_sweep_writes_into_its_study_is_refused(
    call: Call, own: list[str], precious: Path, tmp_path: Path
) -> None:
    settings = [*own, "sweep.space.training.lr=[1e-3,1e-2]", "sweep.trials=1", "sweep.sampler=grid"]
    assert call("sweep", *settings).exit_code == 0
    study, before = tmp_path / "outputs/sweeps/sweep/study.db", look_at(precious)
    written = study.read_bytes()
    for key, value in (
        ("token", '"../../precious"'),
        ("token", "3"),
        ("continues", '"x"'),
        ("default", "[1]"),
        ("block_nll", '{"a": 1}'),
    ):
        study.write_bytes(written)
        with closing(sqlite3.connect(study)) as database, database:
            (trial,) = database.execute("SELECT trial_id FROM trials").fetchone()
            database.execute("DELETE FROM trial_user_attributes WHERE key = ?", (key,))
            words = "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, ?, ?)"
            database.execute(words, (trial, key, value))
        result = call("sweep", *settings)
        assert result.exit_code == 2 and result.stderr.startswith("error: "), (key, value, result.output)
        assert look_at(precious) == before


@pytest.mark.parametrize("commands", ["two", pytest.param("all", marks=pytest.mark.slow)])
def test_a_prepared_folder_from_elsewhere_runs_no_code_and_writes_nowhere_else(
    call: Call, own: list[str], mark: Path, precious: Path, tmp_path: Path, commands: str
) -> None:
    call("prepare", own[0], "prepare.splits={train:0.8,validation:0.2}", "prepare.output=prepared")
    prepared = tmp_path / "prepared"
    theirs = name_everything(mark, precious)
    manifest = read_json(prepared / "manifest.json")
    manifest.pop("checksum")
    manifest["splits"]["letter"] = {**manifest["splits"]["train"], "file": "../precious/letter"}
    manifest["settings"] |= theirs["prepare"]
    write_json(prepared / "manifest.json", {**manifest, **theirs})
    write_json(prepared / "dataset_info.json", {"builder_name": "planted_tracker", "features": {}})
    shutil.copy(tmp_path / "planted_tracker.py", prepared / "prepared.py")
    plant_pickles(prepared, mark)
    (prepared / "best.yaml").write_text(json.dumps(theirs))
    before = look_at(precious)
    train, held_out = f"data.train={prepared}/train.jsonl", f"data.validation={prepared}/validation.jsonl"
    assert call("train", train, held_out, *SHORT).exit_code == 0
    calls = (
        ["train", f"data.train={prepared}", *SHORT], ["prepare", own[0], "prepare.output=prepared", "--force"],
        ["validate", train, held_out], ["compare", held_out, "evaluation.controls=false", BRIEF],
        ["evaluate", held_out, BRIEF],
        ["infer", "--input", f"{prepared}/validation.jsonl", "--output", "answers.jsonl", "inference.max_new_tokens=4"],
        ["prepare", train, "prepare.output=again"],
        ["sweep", train, held_out, *SHORT, "sweep.space.training.lr=[1e-3]", "sweep.trials=1"],
    )  # fmt: skip
    for words in calls if commands == "all" else calls[:2]:
        result = call(*words)
        # A folder is no file of rows; one that holds other files than the manifest's own is not replaced.
        expected = 1 if words[1] == f"data.train={prepared}" else 2 if "--force" in words else 0
        assert result.exit_code == expected, (words, result.output)
    assert not mark.exists() and look_at(precious) == before
    refuse_file(call, prepared / "best.yaml", mark, precious)


@pytest.mark.slow
def test_rows_that_differ_from_what_prepare_wrote_are_refused(call: Call, own: list[str], tmp_path: Path) -> None:
    call("prepare", own[0], "prepare.splits={train:0.8,validation:0.2}", "prepare.output=prepared")
    rows, manifest = tmp_path / "prepared/train.jsonl", tmp_path / "prepared/manifest.json"
    words = ("validate", f"data.train={rows}", f"data.validation={rows.with_name('validation.jsonl')}")
    assert call(*words).exit_code == 0
    rows.write_text(rows.read_text().replace("hall", "well"))
    result = call(*words)
    assert result.exit_code == 1 and f"{rows} differs from the sha256 in {manifest}" in result.stderr
    assert f"delete {manifest} to take them as they are" in result.stderr
    content = manifest.read_text()
    manifest.write_text(content.replace('"rows_read": 24', '"rows_read": 25'))
    assert f"{manifest} cannot be read" in call(*words).stderr
    manifest.write_text('{"files": 3}')  # another program's
    assert call(*words).exit_code == 0


def test_an_adapter_from_elsewhere_runs_no_code(
    call: Call, own: list[str], own_run: RunFolder, mark: Path, precious: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(own_run.adapter, tmp_path / "adapter"))
    model = plant_model(tmp_path / "theirs", mark)
    settings = read_json(adapter / "adapter_config.json")
    auto = {"base_model_class": "Planted", "parent_library": "planted_tracker"}
    told = {"auto_mapping": auto, "base_model_name_or_path": str(model), "trust_remote_code": True}
    write_json(adapter / "adapter_config.json", {**settings, **told})
    shutil.copy(tmp_path / "planted_tracker.py", adapter / "own.py")
    plant_pickles(adapter, mark)
    (adapter / "best.yaml").write_text(json.dumps(name_everything(mark, precious)))
    before, places = look_at(precious), {"--run": [str(adapter)], "held": [own[1]]}
    run, held = ["--run", *places["--run"]], places["held"]
    for words in (
        ["train", *own, f"peft.from_adapter={adapter}"], ["validate", *own, f"peft.from_adapter={adapter}"],
        ["infer", "hi", *run], ["compare", *run, *held, "evaluation.controls=false", BRIEF],
        ["evaluate", *run, *held, BRIEF],
        ["merge", *run, "--output", "merged", "--same-base"], ["analyze", str(adapter)],
        ["benchmark", *run, *own[:2], "benchmark.batch_sizes=[1]", "benchmark.prompt_lengths=[8]",
         "benchmark.repetitions=1", "benchmark.new_tokens=2"],
    ):  # fmt: skip
        result = call(*words)
        assert result.exit_code in (0, 1, 2), (words, result.output)
        assert not mark.exists() and look_at(precious) == before, words
    for key in ("megatron_config", "loftq_config", "runtime_config", "corda_config"):
        write_json(adapter / "adapter_config.json", {**settings, key: {"a": 1}, "megatron_core": "planted_tracker"})
        call("infer", "hi", *run)
        call("train", *own, f"peft.from_adapter={adapter}")
    assert not mark.exists() and look_at(precious) == before
    refuse_file(call, adapter / "best.yaml", mark, precious)


def test_a_run_from_elsewhere_is_sent_nowhere_until_the_user_says_so(
    call: Call, own_run: RunFolder, mark: Path, precious: Path, tmp_path: Path
) -> None:
    (own_run.metadata / "hashes.json").unlink()
    config = own_run.read_metadata("config.json")
    place, database = str(precious / "mirror"), f"sqlite:///{precious}/mlflow.db"
    config["output"]["mirror"] = place
    config["tracking"] |= {"mlflow": {"enabled": True, "uri": database}, "hub": {"repo": "evil/it"}}
    write_json(own_run.metadata / "config.json", config)
    pushed = call("push", str(own_run.root), "--dry-run")
    assert pushed.exit_code == 2 and "'tracking.hub.repo=\"evil/it\"'" in pushed.stderr
    write_json(own_run.metadata / "summary.json", {**own_run.read_metadata("summary.json"), "status": "interrupted"})
    before = look_at(precious)
    for words in (["sync"], ["sync", "--status"], ["train", "--resume"]):
        result = call(*words, str(own_run.root))
        assert result.exit_code == 2 and all(
            key in result.stderr for key in ("output.mirror", "mlflow.uri", "hub.repo")
        )
    record_evaluation(own_run, "compare", {"verdict": None})
    assert [state.name for state in send_evaluations(own_run)] == ["tensorboard"]
    assert look_at(precious) == before
    half = call("sync", str(own_run.root), f"output.mirror={place}", "tracking.hub.repo=null", "--status")
    assert half.exit_code == 2 and "tracking.mlflow.enabled=true" in half.stderr and "output.mirror" not in half.stderr
    given = {
        "output": {"mirror": place},
        "tracking": {"mlflow": config["tracking"]["mlflow"], "hub": {"repo": "evil/it"}},
    }
    require_consent(own_run.root, read_run_config(own_run), given, "output.mirror", "tracking.mlflow", "tracking.hub")
    other = {**given, "output": {"mirror": f"{place}/2"}}
    with pytest.raises(ConfigurationError, match=r"output\.mirror: .* says where to write or to send"):
        require_consent(own_run.root, read_run_config(own_run), other, "output.mirror")


@pytest.mark.slow
def test_a_run_that_was_trained_here_goes_on_sending_and_a_copy_of_it_asks(
    call: Call, small_config: Callable[..., Any], mark: Path, tmp_path: Path
) -> None:
    mirror = str(tmp_path / "mirror")
    config = small_config(training={"max_steps": 1}, output={"mirror": mirror})
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    assert call("sync", str(run.root)).exit_code == 0
    write_json(run.metadata / "summary.json", {**run.read_metadata("summary.json"), "status": "interrupted"})
    TrainingWrapper.resume(run)
    copy = shutil.copytree(run.root, tmp_path / "copy" / run.run_id)
    asked = call("sync", str(copy))
    assert asked.exit_code == 2 and f"'output.mirror=\"{mirror}\"'" in asked.stderr
    assert call("sync", str(copy), f"output.mirror={mirror}").exit_code == 0


def test_doctor_deletes_no_folder_that_a_run_names_as_its_cache(
    call: Call, own_run: RunFolder, precious: Path, tmp_path: Path
) -> None:
    root = tmp_path / "outputs/experiments/default/runs" / own_run.run_id
    run = RunFolder(Path(shutil.copytree(own_run.root, root)))
    (tmp_path / "outputs/cache").mkdir()
    (run.metadata / "hashes.json").unlink()
    for name, change in (("data", {"fingerprint": "../../precious"}), ("config", {"output": {"mirror": None}})):
        write_json(run.metadata / f"{name}.json", {**read_json(run.metadata / f"{name}.json"), **change})
    before = look_at(precious)
    result = call("doctor", str(root), "--repair")
    assert result.exit_code == 1 and "'../../precious' is no fingerprint of rows" in result.output
    assert look_at(precious) == before
