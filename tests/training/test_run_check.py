"""What became of a run's files after they were written is found where they are read, and never taken for a result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import fork  # type: ignore[import-not-found]

from training_lens import TrainingConfig, TrainingWrapper, embedded
from training_lens.core.lens_store import LensStore
from training_lens.errors import AdapterError, CheckpointError, ConfigurationError, DamagedFileError
from training_lens.inference.session import open_run
from training_lens.integrations.hub_files import PathShortener, build_adapter_files
from training_lens.integrations.record import RunRecord
from training_lens.models.adapter_files import require_adapter
from training_lens.models.base_record import check_base
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback
from training_lens.utils.integrity import read_recorded_hashes

Config = Callable[..., TrainingConfig]
READ_TO_ANSWER = ("artifacts/", "metadata/config.json", "metadata/data.json")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_recorded_file_is_compared_where_it_is_read(own_run: RunFolder) -> None:
    recorded = read_recorded_hashes(own_run.root)
    on_disk = {p.relative_to(own_run.root).as_posix() for p in own_run.root.rglob("*") if p.is_file()}
    kinds = ("artifacts/", "metadata/")
    own_hash = {"metadata/hashes.json", "metadata/summary.json", "metadata/base.json"}
    by_process = {"metadata/process.json", "metadata/run.lock"}
    assert {n for n in on_disk if n.startswith(kinds)} - own_hash - by_process == recorded.keys()
    for name in recorded:
        path = own_run.root / name
        whole = path.read_bytes()
        flip(path)
        if name.startswith(READ_TO_ANSWER):
            with pytest.raises(DamagedFileError, match=rf"{path.name} differs from the sha256.*training-lens doctor"):
                open_run(own_run)
        if path.parent == own_run.metadata:
            with pytest.raises(DamagedFileError):
                own_run.read_metadata(path.name)
        path.unlink()
        with pytest.raises(CheckpointError, match="is missing"):
            own_run.read_metadata(path.name) if path.parent == own_run.metadata else own_run.require_adapter()
        path.write_bytes(whole)
    assert open_run(own_run).has_adapter


def test_files_that_hold_their_own_hash_are_compared(own_run: RunFolder) -> None:
    for path in (own_run.metadata / "summary.json", own_run.base_record, own_run.metadata / "hashes.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, next(iter(values)): "other"}))
        with pytest.raises(DamagedFileError, match="checksum"):
            own_run.read_metadata("summary.json")
            open_run(own_run)
        path.write_text(json.dumps(values))


def test_an_adapter_folder_is_compared_with_the_run_or_checkpoint_it_lies_in(own_run: RunFolder) -> None:
    for folder in (own_run.adapter, next(own_run.checkpoints.iterdir()) / "adapter"):
        require_adapter(folder)
        flip(folder / "adapter_model.safetensors")
        with pytest.raises(DamagedFileError, match="adapter_model"):
            require_adapter(folder)


def test_a_run_of_an_earlier_version_has_no_hashes_and_opens(own_run: RunFolder) -> None:
    (own_run.metadata / "hashes.json").unlink()
    for path in (own_run.metadata / "summary.json", own_run.base_record, own_run.lens / "lens.json"):
        values = json.loads(path.read_text())
        values.pop("checksum")
        path.write_text(json.dumps(values))
    (own_run.base_record).write_text(json.dumps({"id": "embedded", "revision": None, "weights": None}))
    assert open_run(own_run).has_adapter and own_run.status == "finished"


@pytest.mark.slow
def test_a_replaced_base_is_refused_and_may_be_accepted(small_config: Config, tmp_path: Path) -> None:
    base = Path(shutil.copytree(embedded.PATHS[embedded.MODEL], tmp_path / "model"))
    config = small_config(model={"id": str(base)}, training={"max_steps": 2}, lens={"enabled": False})
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    flip(base / "model.safetensors")
    with pytest.raises(AdapterError, match=r"model.safetensors in .* changed since.*model.accept_changed_base=true"):
        open_run(run)
    assert open_run(run, given={"model": {"accept_changed_base": True}}).has_adapter


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_file_makes_room(small_config: Config, tmp_path: Path) -> None:
    config = small_config(training={"max_steps": 2}, lens={"enabled": False}, output={"run_id": "mine"})
    run = RunFolder(Path(config.output.base_output_dir) / "experiments/default/runs/mine")
    for folder in (run.checkpoints, run.logs, run.metadata, run.reports):
        folder.mkdir(parents=True)
    (run.metadata / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="died before it began: start it again"):
        TrainingWrapper.resume(run)
    TrainingWrapper(config).train()
    assert run.status == "finished"
    with pytest.raises(ConfigurationError, match="exists already"):
        TrainingWrapper(config).train()


@pytest.mark.slow
def test_a_resume_records_the_base_that_a_kill_left_unrecorded(small_config: Config) -> None:
    class Killed(Callback):
        def on_step_end(self, trainer: object, report: object) -> None:
            raise KeyboardInterrupt

    config = small_config(training={"max_steps": 2}, lens={"enabled": False}, output={"run_id": "mine"})
    run = RunFolder(Path(config.output.base_output_dir) / "experiments/default/runs/mine")
    with pytest.raises(KeyboardInterrupt):
        TrainingWrapper(config, callbacks=(Killed(),)).train()
    run.base_record.unlink()
    TrainingWrapper.resume(run)
    assert run.status == "finished" and check_base(run.base_record, config.model)


class Exit(Callback):
    """Ends its process after the fifth step's checkpoint, as a kill would."""

    def on_checkpoint(self, trainer: Any, folder: Path) -> None:
        if trainer.state.step == 5:
            os._exit(9)


@pytest.mark.slow
def test_a_kill_after_the_last_checkpoint_leaves_no_gap_and_no_step_twice_in_the_lens(small_config: Config) -> None:
    every = dict.fromkeys(("spectra_every", "snapshot_every", "probe_every"), 2)
    sections = {"training": {"max_steps": 5}, "lens": {"report": False, "scalars_every": 1, **every}}
    whole = small_config(**sections, output={"run_id": "whole"})
    killed = small_config(**sections, output={"run_id": "killed"})
    TrainingWrapper(whole).train()
    ended = fork(TrainingWrapper(killed, callbacks=(Exit(),)).train)
    ended.join()
    assert ended.exitcode == 9
    runs = [RunFolder(Path(whole.output.base_output_dir) / "experiments/default/runs" / c) for c in ("whole", "killed")]
    TrainingWrapper.resume(runs[1])
    stores = [LensStore(run.lens) for run in runs]
    assert stores[0].tables() == stores[1].tables()
    for table in stores[0].tables():
        one, two = (
            [] if not list((run.lens / table).glob("*.parquet")) else store.table(table).column("step").to_pylist()
            for run, store in zip(runs, stores, strict=True)
        )
        assert one == two, table
        assert stores[0].snapshot_steps(table) == stores[1].snapshot_steps(table)
    assert not list(runs[1].root.rglob(".tmp-*"))


def test_nothing_damaged_is_pushed(own_run: RunFolder) -> None:
    record = RunRecord(own_run)
    assert len(build_adapter_files(record, PathShortener(record))) > 2
    for path in (own_run.adapter / "adapter_model.safetensors", own_run.tokenizer / "tokenizer.json"):
        whole = path.read_bytes()
        flip(path)
        with pytest.raises(DamagedFileError, match=path.stem):
            build_adapter_files(record, PathShortener(record))
        path.write_bytes(whole)
