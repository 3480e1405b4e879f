"""A folder from elsewhere is data: code that it names runs only where this machine's user allows it, and as they did.

Each test plants code that leaves a mark when it is run, by way of every file that could name it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from planted import TRACKER, pickled, plant_model
from slow_cases import mark_slow

from training_lens.config.run_config import find_writer, read_run_config, require_consent
from training_lens.errors import ConfigurationError
from training_lens.integrations.mirror import MirrorIntegration
from training_lens.integrations.record import RunRecord
from training_lens.runs.run_folder import RunFolder
from training_lens.training.run import TrainingWrapper
from training_lens.utils.consent import read_consent, save_consent
from training_lens.utils.files import hash_file, read_json, write_json

Call = Callable[..., Result]


@pytest.fixture
def hostile(embedded_run: RunFolder, tmp_path: Path, mark: Path) -> RunFolder:
    """A finished run from elsewhere, which names code everywhere that a config of ours could."""
    root = tmp_path / "outputs/experiments/default/runs" / embedded_run.run_id
    run = RunFolder(Path(shutil.copytree(embedded_run.root, root)))
    config = run.read_metadata("config.json")
    for name in ("hashes.json", "base.json"):  # who plants code also takes away what would tell of it
        (run.metadata / name).unlink()
    model = plant_model(tmp_path / "theirs", mark)
    config["model"] |= {"id": str(model), "trust_remote_code": True}
    config["tracking"]["custom"] = {"planted_tracker.Planted": {}}
    config["evaluation"]["metrics"] = ["planted_tracker"]
    rewrite(run, "config.json", config)
    shutil.copy(model / "own.py", run.tokenizer / "tokenization_own.py")
    for folder in (run.adapter, *run.checkpoints.glob("step-*")):
        (folder / "adapter_model.bin").write_bytes(pickled(mark))
        (folder / "optimizer.pt").write_bytes(pickled(mark))
    settings = read_json(run.adapter / "adapter_config.json")
    auto = {"base_model_class": "Planted", "parent_library": "planted_tracker"}
    write_json(run.adapter / "adapter_config.json", {**settings, "auto_mapping": auto})
    return run


def rewrite(run: RunFolder, name: str, values: dict[str, Any]) -> None:
    """Other metadata, as its author sees to it: no hash speaks against it."""
    (run.metadata / "hashes.json").unlink(missing_ok=True)
    write_json(run.metadata / name, values)


def unfinished(run: RunFolder) -> RunFolder:
    rewrite(run, "summary.json", run.read_metadata("summary.json") | {"status": "interrupted"})
    return run


ASKED = [  # commands that would run the model's code, or a tracker's: they say how it is allowed
    ("infer", "hi", "--run"),
    ("compare", "--run"),
    ("evaluate", "--run"),
    ("merge", "--run"),
    ("benchmark", "--run"),
    ("rank",),
    ("sync",),
    ("sync", "--status"),
]
LOOKED = [
    ("analyze",),
    ("report", "--format", "md"),
    ("export", "--data-type", "loss"),
    ("experiment", "show"),
    ("push", "--dry-run"),
    ("experiment", "tag", "--remove"),
]


def test_a_run_from_elsewhere_runs_no_code(call: Call, hostile: RunFolder, mark: Path) -> None:
    for command in ASKED:
        result = call(*command, str(hostile.root))
        assert not mark.exists() and result.exit_code == 2, command
        key = "tracking.custom" if command[0] == "sync" else "model.trust_remote_code=true"
        assert "if you trust it, repeat the command with" in result.stderr and key in result.stderr, command


def test_a_run_from_elsewhere_is_read_without_its_code(call: Call, hostile: RunFolder, mark: Path) -> None:
    for command in LOOKED:
        more = ("me/it",) if command[0] == "push" else ("x",) if "tag" in command else ()
        call(*command, str(hostile.root), *more)
        assert not mark.exists(), command


def test_a_run_from_elsewhere_is_not_gone_on_with(call: Call, hostile: RunFolder, mark: Path) -> None:
    result = call("train", "--resume", str(unfinished(hostile).root))
    assert not mark.exists() and result.exit_code == 2 and "model.trust_remote_code=true" in result.stderr
    one = call("train", "--resume", str(hostile.root), "model.trust_remote_code=true")
    assert not mark.exists() and one.exit_code == 2 and "tracking.custom" in one.stderr
    other = call("train", "--resume", str(hostile.root), "model.trust_remote_code=true", "tracking.custom={a.B: {}}")
    assert not mark.exists() and other.exit_code == 2


@pytest.mark.slow
def test_a_run_from_elsewhere_says_not_where_its_cache_is_written(
    finished_run: RunFolder, tmp_path: Path, mark: Path
) -> None:
    root = tmp_path / "outputs/experiments/default/runs" / finished_run.run_id
    run = unfinished(RunFolder(Path(shutil.copytree(finished_run.root, root))))
    config = run.read_metadata("config.json")
    config["output"]["base_output_dir"] = str(tmp_path / "precious")
    rewrite(run, "config.json", config)
    TrainingWrapper.resume(run)
    assert not (tmp_path / "precious").exists() and (tmp_path / "outputs/cache").is_dir()


@pytest.mark.parametrize("name", ["logs/metrics.jsonl", "checkpoints", "metadata/summary.json", "reports", "lens"])
def test_nothing_is_written_through_a_link_in_a_run(
    call: Call, own_run: RunFolder, tmp_path: Path, mark: Path, name: str
) -> None:
    (tmp_path / "precious").mkdir()
    target = tmp_path / "precious" / Path(name).name
    shutil.move(own_run.root / name, target)
    (own_run.root / name).symlink_to(target)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "precious").rglob("*")}
    for command in (("train", "--resume"), ("report",), ("compare", "--run"), ("sync",), ("merge", "--run")):
        result = call(*command, str(own_run.root))
        assert result.exit_code in (1, 2) and "symbolic link" in result.stderr, (command, result.output)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "precious").rglob("*")} == before


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "name",
    [
        "metadata/summary.json", "logs/metrics.jsonl", mark_slow("artifacts/adapter/adapter_model.safetensors"),
        mark_slow("lens/adapters/step-00000001.safetensors"), mark_slow("lens/loss/00000001-00000002.parquet"),
    ],
)  # fmt: skip
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(call: Call, own_run: RunFolder, name: str) -> None:
    (own_run.root / name).unlink(missing_ok=True)
    os.mkfifo(own_run.root / name)
    for command in (("doctor",), ("report", "--format", "md")):
        call(*command, str(own_run.root))  # it ends, with no error but ours


def test_a_mirror_from_elsewhere_runs_no_code(call: Call, hostile: RunFolder, mark: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "mirror")
    MirrorIntegration(RunRecord(unfinished(hostile), {"output": {"mirror": place}})).deliver(ended=True)
    for command in (("train", "--resume"), ("report",), ("infer", "hi", "--run"), ("rank",)):
        call(*command, f"file://{place}", f"output.base_output_dir={tmp_path / command[0]}")
        call(*command, f"file://{place}/experiments/default/runs/{hostile.run_id}", "output.base_output_dir=x")
    assert not mark.exists()


def test_the_files_of_others_allow_nothing_as_config_files(
    call: Call, hostile: RunFolder, mark: Path, tmp_path: Path
) -> None:
    named = {"model": {"id": str(tmp_path / "theirs"), "trust_remote_code": True}}
    for marker, content in (
        ("sweeps/theirs/best.yaml", "{}"), ("sweep/study.db", ""), ("adapter/adapter_config.json", "{}"),
        ("prepared/manifest.json", '{"made_by": "training-lens prepare"}'), ("m/mirror.json", "{}"),
    ):  # fmt: skip
        folder = (tmp_path / marker).parent
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / marker).write_text(content)
        (file := folder / "best.yaml").write_text(json.dumps(named))
        result = call("train", "--config", str(file))
        assert not mark.exists() and result.exit_code == 2 and "model.trust_remote_code=true" in result.stderr, marker
    result = call("validate", "--config", str(hostile.metadata / "config.json"))
    assert not mark.exists() and result.exit_code == 2
    for key in ("model.trust_remote_code", "tracking.custom", "evaluation.metrics", "output.base_output_dir"):
        assert f"- {key}: " in result.stderr
    assert result.stderr.count("repeat the command with") == 4
    (tmp_path / "own").mkdir()
    (mine := tmp_path / "own" / "config.json").write_text(json.dumps(named))
    assert find_writer(mine) is None


def test_the_user_allows_it_on_the_command_line(call: Call, hostile: RunFolder, mark: Path) -> None:
    result = call("infer", "hi", "--run", str(hostile.root), "model.trust_remote_code=true")
    assert result.exit_code == 0, result.stderr
    assert mark.read_text().startswith("model")
    assert call("infer", "hi", "--run", str(hostile.root)).exit_code == 2, "it was for that command alone"


@pytest.mark.slow
def test_what_the_user_trains_with_goes_on_and_what_changed_does_not(
    call: Call, small_config: Callable[..., Any], mark: Path, tmp_path: Path
) -> None:
    model = plant_model(tmp_path / "mine", mark)
    custom: dict[str, dict[str, str]] = {"planted_tracker.Planted": {}}
    config = small_config(
        model={"id": str(model), "trust_remote_code": True}, tracking={"custom": custom}, training={"max_steps": 1}
    )
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    assert call("infer", "hi", "--run", str(run.root)).exit_code == 0
    assert call("sync", str(run.root)).exit_code == 0
    TrainingWrapper.resume(unfinished(run))
    (model / "own.py").write_text((model / "own.py").read_text() + "\n# another\n")
    mark.unlink()
    changed = call("infer", "hi", "--run", str(run.root))
    assert changed.exit_code == 2 and "another one than you allowed" in changed.stderr
    (tmp_path / "planted_tracker.py").write_text(TRACKER.format(mark=str(mark)) + "\n# another\n")
    assert call("sync", str(run.root)).exit_code == 2
    moved = shutil.copytree(run.root, tmp_path / "copy" / run.run_id)
    assert call("sync", str(moved)).exit_code == 2 and not mark.exists()


def test_code_of_other_repositories_is_not_what_was_allowed(
    hostile: RunFolder, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, root = read_run_config(hostile), hostile.root
    code = {f"model.trust_remote_code: {part}" for part in (f"{config.model.id} at None",)}
    code |= {f"model.trust_remote_code: {hash_file(hostile.tokenizer / 'tokenization_own.py')}"}
    save_consent(root, code)
    require_consent(root, config, {}, "model.trust_remote_code")
    settings = read_json(hostile.tokenizer / "tokenizer_config.json")
    theirs = {"AutoTokenizer": [None, "evil/code--own.Tokenizer"]}
    write_json(hostile.tokenizer / "tokenizer_config.json", {**settings, "auto_map": theirs})
    with pytest.raises(ConfigurationError, match="another one than you allowed"):
        require_consent(root, config, {}, "model.trust_remote_code")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(mark.parent / "home"))
    assert not read_consent(root)
