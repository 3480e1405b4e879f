"""The store returns captures unchanged, within its size limits, and skips damaged files."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from forked import fork  # type: ignore[import-not-found]

from training_lens.config.lens_section import LensSection
from training_lens.core.arrow import arrow_table, extract_series, extract_vectors
from training_lens.core.lens_store import LensStore, RunningCaptures
from training_lens.core.lens_writer import LensWriter
from training_lens.core.segments import MAX_SEGMENTS, SegmentedTable, TableSegment, list_segments
from training_lens.core.types import Captured, DataType, LensManifest, ModuleRecord
from training_lens.errors import ConfigurationError, LensError
from training_lens.utils.integrity import read_sealed, write_sealed
from training_lens.utils.logging import ROOT

ROWS = ("layers.0.q", "layers.0.v", "layers.1.q")
MODULES = tuple(ModuleRecord(name, 0, "q", 4, 8, 8, 2.0) for name in ROWS)
MANIFEST = LensManifest(MODULES, tables={"weights": DataType.ADAPTER_WEIGHTS}, settings={"total_steps": 9})


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger(ROOT), "propagate", True)
    yield caplog


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "lens"


def writer(folder: Path, after_step: int = 0, **section: float) -> LensWriter:
    return LensWriter(folder, MANIFEST, LensSection.model_validate(section), after_step)


def norms(step: int, rows: tuple[str, ...] = ROWS) -> Captured:
    """A norm that tells its step and row, and another."""
    values = torch.arange(len(rows), dtype=torch.float32) + 10 * step
    return Captured({"norm": values, "cosine": torch.full((len(rows),), 0.5)}, rows=rows)


def loss(step: int) -> Captured:
    return Captured({"loss": torch.tensor([1 / step])})


def captured_run(folder: Path, steps: range, every: int = 5, after_step: int = 0, **section: float) -> LensWriter:
    """Norms and loss of each step, flushed every so many steps."""
    lens = writer(folder, after_step, **section)
    for step in steps:
        lens.add("weights", step, norms(step))
        lens.add("loss", step, loss(step))
        if step % every == 0:
            lens.flush()
    lens.close()
    return lens


def assert_exact(folder: Path, steps: list[int]) -> None:
    series = LensStore(folder).series("weights", "norm")
    assert series.steps.tolist() == steps and series.names == ROWS
    np.testing.assert_array_equal(series.values, 10.0 * np.array(steps)[:, None] + np.arange(3))


def segment_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_was_captured_is_read_back(folder: Path) -> None:
    lens = writer(folder)
    for step in (1, 2, 4):
        spectra = [torch.arange(rank, dtype=torch.float32) + step for rank in (2, 3, 0)]
        lens.add("weights", step, Captured(norms(step).scalars, {"spectrum": spectra}, {"a": torch.eye(2)}, ROWS))
        lens.add("loss", step, loss(step))
    lens.close({"weights": 0.25})
    store = LensStore(folder)
    assert (store.manifest, store.tables(), store.cost()) == (MANIFEST, ("loss", "weights"), {"weights": 0.25})
    assert_exact(folder, [1, 2, 4])
    np.testing.assert_allclose(store.series("loss", "loss").column("run"), [1, 0.5, 0.25])
    steps, spectra_by_name = store.vectors("weights", "spectrum")
    assert steps.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(spectra_by_name["layers.0.q"], [[1, 2], [2, 3], [4, 5]])
    np.testing.assert_array_equal(spectra_by_name["layers.0.v"], [[1, 2, 3], [2, 3, 4], [4, 5, 6]])
    assert spectra_by_name["layers.1.q"].shape == (3, 0)
    assert store.snapshot_steps("weights") == [1, 2, 4] and torch.equal(store.snapshot("weights", 4)["a"], torch.eye(2))
    assert not store.damaged and not list(folder.rglob(".tmp-*"))


def test_a_table_has_the_stated_columns_and_becomes_a_frame(folder: Path) -> None:
    lens = writer(folder)
    for step in (1, 2):
        lens.add("weights", step, Captured(norms(step).scalars, {"spectrum": [torch.ones(2)] * 3}, rows=ROWS))
        lens.flush()
    table = LensStore(folder).table("weights")
    names = pa.dictionary(pa.int32(), pa.string())
    columns = {"step": pa.int32(), "module": names, "norm": pa.float32(), "cosine": pa.float32()}
    assert dict(zip(table.column_names, table.schema.types, strict=True)) == {
        **columns,
        "spectrum": pa.list_(pa.float32()),
    }
    assert LensStore(folder).table("weights", ["norm"]).column_names == ["step", "module", "norm"]
    assert LensStore(folder).table("weights", ["step"]).column_names == ["step", "module"]
    frame = LensStore(folder).pandas("weights")
    assert frame.shape == (6, 5) and frame["module"].tolist() == [*ROWS, *ROWS]


def test_polars_frames_or_one_line_about_the_package(folder: Path) -> None:
    captured_run(folder, range(1, 3))
    try:
        import polars  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigurationError, match="pip install polars"):
            LensStore(folder).polars("weights")
    else:
        assert LensStore(folder).polars("weights").shape == (6, 4)


def test_a_table_in_memory_reads_as_one_from_disk(folder: Path) -> None:
    captured_run(folder, range(1, 8))
    table = arrow_table([(step, norms(step)) for step in range(1, 8)])
    assert table.to_pylist() == LensStore(folder).table("weights").to_pylist()
    np.testing.assert_array_equal(
        extract_series(table, "norm").values, LensStore(folder).series("weights", "norm").values
    )


def test_flushed_captures_are_readable_while_training_runs(folder: Path) -> None:
    lens = writer(folder)
    store = LensStore(folder)
    assert store.tables() == ()
    for step in range(1, 8):
        lens.add("weights", step, norms(step))
        if step % 3 == 0:
            lens.flush()
            assert store.series("weights", "norm").steps.tolist() == list(range(1, step + 1))
    assert_exact(folder, list(range(1, 7)))


def test_captures_are_copies_without_the_model(folder: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4))
    lens = writer(folder)
    scalars, vectors = {"norm": weight.norm(dim=1)}, {"row": list(weight)}
    lens.add("weights", 1, Captured(scalars, vectors, {"w": weight}, ROWS))
    with torch.no_grad():
        weight.zero_()
    lens.close()
    store = LensStore(folder)
    assert (store.series("weights", "norm").values == 2).all()
    assert (store.vectors("weights", "row")[1]["layers.0.q"] == 1).all()
    assert (store.snapshot("weights", 1)["w"] == 1).all()


def test_nan_and_infinity_are_stored_unchanged(folder: Path) -> None:
    lens = writer(folder)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")])
    lens.add("weights", 1, Captured({"norm": odd}, {"spectrum": [odd] * 3}, {"a": odd}, ROWS))
    lens.close()
    store = LensStore(folder)
    np.testing.assert_array_equal(store.series("weights", "norm").values, [odd.numpy()])
    np.testing.assert_array_equal(store.vectors("weights", "spectrum")[1]["layers.0.v"], [odd.numpy()])
    np.testing.assert_array_equal(store.snapshot("weights", 1)["a"], odd)


def test_scalars_of_any_float_are_kept_as_float32(folder: Path) -> None:
    lens = writer(folder)
    values = [0.1, 256.0, 1e-30]
    dtypes = {"half": torch.bfloat16, "double": torch.float64, "single": torch.float32}
    lens.add("weights", 1, Captured({m: torch.tensor(values, dtype=d) for m, d in dtypes.items()}, rows=ROWS))
    lens.close()
    for measure, dtype in dtypes.items():
        kept = torch.tensor(values, dtype=dtype).to(torch.float32).numpy()
        np.testing.assert_array_equal(LensStore(folder).series("weights", measure).values, [kept])


@pytest.mark.parametrize("flush_between", [False, True])
def test_rows_and_measures_may_change_between_steps(folder: Path, flush_between: bool) -> None:
    lens = writer(folder)
    lens.add("weights", 1, norms(1))
    if flush_between:
        lens.flush()
    lens.add("weights", 2, Captured({"norm": torch.tensor([7.0, 8.0])}, rows=("new", ROWS[0])))
    lens.close()
    store = LensStore(folder)
    series = store.series("weights", "norm")
    assert series.names == (*ROWS, "new")
    np.testing.assert_array_equal(series.values, [[10, 11, 12, np.nan], [8, np.nan, np.nan, 7]])
    assert store.series("weights", "cosine").steps.tolist() == [1]
    assert store.table("weights").column("cosine").null_count == 2


def test_a_table_that_is_added_to_twice_in_a_step_has_both(folder: Path) -> None:
    lens = writer(folder)
    for step in (1, 2):
        lens.add("weights", step, norms(step))
        lens.flush()
        lens.add("weights", step, Captured({"drift": torch.full((3,), float(step))}, rows=ROWS))
        lens.flush()
    assert_exact(folder, [1, 2])
    np.testing.assert_array_equal(LensStore(folder).series("weights", "drift").values, [[1] * 3, [2] * 3])


def test_captures_go_to_disk_when_they_are_due(folder: Path) -> None:
    lens = writer(folder, flush_seconds=3600)
    lens.add("weights", 1, norms(1))
    lens.flush_if_due()
    assert LensStore(folder).tables() == ()
    lens.add("weights", 2, Captured(tensors={"a": torch.zeros(2_100_000)}))
    lens.flush_if_due()  # much is pending
    assert_exact(folder, [1])
    prompt = writer(folder, after_step=1, flush_seconds=0)
    prompt.add("weights", 2, norms(2))
    prompt.flush_if_due()
    assert_exact(folder, [1, 2])


def write_until_killed(folder: Path, descriptor: int) -> None:
    """Captures a run without end, and tells each step up to which all is flushed."""
    rows = ("layers.0.q", "layers.0.v", "layers.1.q")
    lens = LensWriter(folder, LensManifest(()), LensSection(scalars_megabytes=64))
    for step in count(1):
        values = torch.arange(3) + 10.0 * step
        tensors = {"a": torch.full((64, 64), float(step))} if step % 10 == 0 else {}
        lens.add("weights", step, Captured({"norm": values}, tensors=tensors, rows=rows))
        if step % 5 == 0:
            lens.flush()
            os.write(descriptor, f"{step}\n".encode())


def test_a_killed_process_loses_at_most_what_was_not_flushed(folder: Path) -> None:
    reader, writer = os.pipe()
    process = fork(write_until_killed, folder, writer)
    os.close(writer)
    with os.fdopen(reader) as told:
        flushed = 0
        while flushed < 5 * MAX_SEGMENTS + 50:  # merges were among them
            flushed = int(told.readline())
        process.kill()
        flushed = max([flushed, *map(int, told.read().split())])
    process.join()
    store = LensStore(folder)
    steps = store.series("weights", "norm").steps
    assert flushed <= len(steps) <= flushed + 5 and not store.damaged
    assert_exact(folder, list(range(1, len(steps) + 1)))
    assert store.snapshot_steps("weights")[: flushed // 10] == list(range(10, flushed + 1, 10))
    captured_run(folder, range(101, 111), after_step=100)
    assert_exact(folder, list(range(1, 111)))
    assert not list(folder.rglob(".tmp-*"))


@pytest.mark.parametrize("after_step", [3, 5, 12, 40])
def test_a_resumed_run_drops_later_steps(folder: Path, after_step: int) -> None:
    lens = captured_run(folder, range(1, 21))
    for step in (5, 15):
        lens.add("weights", step, Captured(tensors={"a": torch.ones(2)}))
    lens.close()
    writer(folder, after_step)
    left = min(after_step, 20)
    assert_exact(folder, list(range(1, left + 1)))
    assert LensStore(folder).snapshot_steps("weights") == [step for step in (5, 15) if step <= left]
    captured_run(folder, range(left + 1, 24), after_step=left)
    assert_exact(folder, list(range(1, 24)))


@pytest.mark.parametrize(("examples", "is_warned"), [(1, True), (8, False)])
def test_another_probe_set_after_a_resume_is_said(
    folder: Path, logged: pytest.LogCaptureFixture, examples: int, is_warned: bool
) -> None:
    for after_step, number in ((0, examples), (3, 8)):
        probe = {"examples": number, "tokens": 400, "supervised_tokens": 300}
        LensWriter(folder, replace(MANIFEST, probe=probe), LensSection(), after_step).close()
    assert ("8 examples of 400 tokens now, and had 1 of 400" in logged.text) == is_warned


def test_a_new_run_drops_all_captures_and_nothing_else(folder: Path) -> None:
    lens = captured_run(folder, range(1, 8))
    lens.add("weights", 0, Captured(norms(0).scalars, tensors={"a": torch.ones(2)}, rows=ROWS))
    lens.close({"weights": 1.0})
    (folder / "notes.txt").write_text("mine")
    (folder / "weights" / "notes.parquet").write_text("mine")
    writer(folder)
    store = LensStore(folder)
    assert (store.tables(), store.cost()) == ((), {})
    assert (folder / "notes.txt").is_file() and (folder / "weights" / "notes.parquet").is_file()


def test_damaged_files_are_named_and_skipped(folder: Path, logged: pytest.LogCaptureFixture) -> None:
    lens = captured_run(folder, range(1, 16))
    for step in (5, 10):
        lens.add("weights", step, Captured(tensors={"a": torch.ones(200)}))
    lens.close()
    broken = folder / "weights/00000006-00000010.parquet", folder / "weights/step-00000005.safetensors"
    for path in broken:
        cut_short(path)
    store = LensStore(folder)
    for _ in range(2):
        assert store.series("weights", "norm").steps.tolist() == [*range(1, 6), *range(11, 16)]
        assert store.snapshot_steps("weights") == [10]
    assert store.damaged == list(broken)
    warnings = [record.getMessage() for record in logged.records if record.name.endswith("store")]
    assert len(warnings) == 2
    assert str(broken[0]) in warnings[0] and "6-10 is lost" in warnings[0] and str(broken[1]) in warnings[1]
    with pytest.raises(LensError, match="step-00000005"):
        store.snapshot("weights", 5)


def captures_with_snapshots(folder: Path, **section: float) -> None:
    lens = writer(folder, **section)
    for step in range(1, 31):
        tensors = {"a": torch.ones(2)} if step % 10 == 0 else {}
        lens.add("weights", step, Captured(norms(step).scalars, tensors=tensors, rows=ROWS))
        if step % 5 == 0:
            lens.flush()
    lens.close()


def test_every_deleted_capture_file_is_noticed(folder: Path, logged: pytest.LogCaptureFixture) -> None:
    captures_with_snapshots(folder)
    paths = [*folder.glob("*/*.parquet"), *folder.glob("*/*.safetensors")]
    assert len(paths) == 9 and not LensStore(folder).damaged
    for path in paths:
        content = path.read_bytes()
        path.unlink()
        assert LensStore(folder).damaged == [path] and str(path) in logged.records[-1].getMessage()
        path.write_bytes(content)
    shutil.rmtree(folder / "weights")
    assert set(LensStore(folder).damaged) == set(paths)


@pytest.mark.parametrize("after_step", [3, 12, 30])
def test_missing_files_stay_known_after_a_resume(folder: Path, after_step: int) -> None:
    captures_with_snapshots(folder)
    for name in ("00000001-00000005.parquet", "00000011-00000015.parquet", "step-00000010.safetensors"):
        (folder / "weights" / name).unlink()
    lens = writer(folder, after_step)
    kept = {
        "00000001-00000005.parquet": "00000001-00000003.parquet" if after_step == 3 else "00000001-00000005.parquet",
        "00000011-00000015.parquet": {3: "", 12: "00000011-00000012.parquet"}.get(
            after_step, "00000011-00000015.parquet"
        ),
        "step-00000010.safetensors": "" if after_step == 3 else "step-00000010.safetensors",
    }
    lost = {folder / "weights" / name for name in kept.values() if name}
    assert set(LensStore(folder).damaged) == lost
    lens.add("weights", 31, norms(31))
    lens.close()
    assert set(LensStore(folder).damaged) == lost


@pytest.mark.slow
def test_merged_thinned_and_dropped_files_do_not_count_as_missing(folder: Path) -> None:
    many = writer(folder)
    for step in range(1, 2 * MAX_SEGMENTS):
        many.add("weights", step, norms(step))
        many.flush()
    listed = {path.name for path in (folder / "weights").glob("*.parquet")}
    assert len(listed) <= MAX_SEGMENTS and not LensStore(folder).damaged
    small = writer(folder, scalars_megabytes=1, snapshots_megabytes=1)
    for step in range(1, 60):
        small.add("weights", step, Captured(tensors={"a": torch.rand(30_000)}))
        small.flush()
    assert len(LensStore(folder).snapshot_steps("weights")) < 10 and not LensStore(folder).damaged


def test_a_damaged_file_list_is_reported(folder: Path, logged: pytest.LogCaptureFixture) -> None:
    captures_with_snapshots(folder)
    listing = folder / "files.json"
    listing.write_text(listing.read_text().replace("00000005", "00000006", 1))
    assert LensStore(folder).damaged == [listing] and "is not known" in logged.records[-1].getMessage()
    assert_exact(folder, list(range(1, 31)))
    writer(folder, after_step=30).close()
    assert not LensStore(folder).damaged
    listing.unlink()  # as an earlier version left it
    assert not LensStore(folder).damaged


def test_no_flipped_bit_of_a_segment_or_a_snapshot_is_ever_read(folder: Path) -> None:
    lens = writer(folder)
    for step in range(1, 41):
        lens.add("weights", step, Captured({"norm": torch.rand(3)}, tensors={"a": torch.eye(2)}, rows=ROWS))
        if step % 20 == 0:
            lens.flush()
    lens.close()
    rng = np.random.default_rng(0)
    for path in ((folder / "weights/00000021-00000040.parquet"), (folder / "weights/step-00000020.safetensors")):
        whole = path.read_bytes()
        for bit in rng.choice(8 * len(whole), 60, replace=False).tolist():
            if b"training-lens-sha256:" in whole[bit // 8 - 20 : bit // 8 + 21]:
                continue  # the name of the hash itself: nothing else is changed
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            store = LensStore(folder)
            assert store.series("weights", "norm").steps.tolist() == list(
                range(1, 21 if path.suffix == ".parquet" else 41)
            )
            assert 20 in store.snapshot_steps("weights") or path.suffix == ".safetensors"
            assert store.damaged == [path]
            assert store.measures("weights") == ("norm",)
        path.write_bytes(whole)
    assert not LensStore(folder).damaged


def test_a_resumed_run_keeps_clear_of_a_damaged_segment(folder: Path, logged: pytest.LogCaptureFixture) -> None:
    captured_run(folder, range(1, 21), every=10)
    cut_short(folder / "weights/00000011-00000020.parquet")
    captured_run(folder, range(16, 18), after_step=15)
    store = LensStore(folder)
    assert store.series("weights", "norm").steps.tolist() == [*range(1, 11), 16, 17]
    assert [path.name for path in store.damaged] == ["00000011-00000015.parquet"]
    assert "11-15 is lost" in logged.text


def wide_run(folder: Path, steps: int, megabytes: int, every: int) -> tuple[LensWriter, Callable[[int], np.ndarray]]:
    """224 rows of 6 measures of noise, which hardly compress; and what each step's first measure was."""
    rows = tuple(f"layers.{i}" for i in range(224))

    def made(step: int) -> torch.Tensor:
        return torch.randn(6, 224, generator=torch.Generator().manual_seed(step))

    lens = writer(folder, scalars_megabytes=megabytes)
    for step in range(1, steps + 1):
        values = made(step)
        lens.add("weights", step, Captured({f"m{i}": values[i] for i in range(6)}, rows=rows))
        lens.add("loss", step, loss(step))
        lens.flush_if_due() if step % every else lens.flush()
    lens.close()
    return lens, lambda step: made(step)[0].numpy()


def test_thinning_keeps_the_limit_and_the_rest_stays_exact(folder: Path) -> None:
    _, made = wide_run(folder, steps=1200, megabytes=1, every=7)
    on_disk = sum(path.stat().st_size for path in (folder / "weights").glob("*.parquet"))
    assert 300_000 < on_disk <= 1_000_000
    store = LensStore(folder)
    series = store.series("weights", "m0")
    steps = series.steps.tolist()
    assert steps[0] == 1 and steps[-1] == 1200 and len(set(steps)) == len(steps)
    assert store.table("weights").num_rows == len(steps) * 224
    np.testing.assert_array_equal(series.values, [made(step) for step in steps])
    old = np.array(steps[1 : len(steps) // 2])
    assert (np.diff(old) == np.diff(old)[0]).all() and np.diff(old)[0] in (4, 8, 16)
    assert store.series("loss", "loss").steps.tolist() == list(range(1, 1201))
    assert len(segment_files(folder / "weights")) <= MAX_SEGMENTS


def test_one_flush_over_the_limit_is_thinned_too(folder: Path) -> None:
    lens = writer(folder, scalars_megabytes=1)
    for step in range(1, 601):
        lens.add("weights", step, Captured({"norm": torch.rand(1000)}, rows=[str(i) for i in range(1000)]))
    lens.close()
    assert lens.size <= 1_000_000
    assert LensStore(folder).series("weights", "norm").steps.tolist() == [1, *range(4, 601, 4)]


@pytest.mark.slow
def test_thinning_continues_after_a_resume(folder: Path) -> None:
    wide_run(folder, steps=400, megabytes=1, every=7)
    stride = SegmentedTable(folder / "weights", 400).stride
    assert stride > 1
    lens = writer(folder, after_step=390, scalars_megabytes=1)
    assert LensStore(folder).series("weights", "m0").steps[-1] <= 390
    for step in range(391, 900):
        lens.add(
            "weights", step, Captured({f"m{i}": torch.rand(224) for i in range(6)}, rows=list(map(str, range(224))))
        )
        lens.flush_if_due()
    lens.close()
    assert SegmentedTable(folder / "weights", 900).size <= 1_000_000
    assert SegmentedTable(folder / "weights", 900).stride >= stride


@pytest.mark.slow
def test_many_small_segments_are_merged_and_lose_nothing(folder: Path) -> None:
    captured_run(folder, range(1, 3 * MAX_SEGMENTS), every=1)
    for table in ("weights", "loss"):
        assert len(segment_files(folder / table)) <= MAX_SEGMENTS + 1
    assert_exact(folder, list(range(1, 3 * MAX_SEGMENTS)))
    assert LensStore(folder).series("loss", "loss").steps.tolist() == list(range(1, 3 * MAX_SEGMENTS))


def test_a_kill_between_merging_and_deleting_duplicates_nothing(folder: Path, tmp_path: Path) -> None:
    captured_run(folder, range(1, 31))
    before = tmp_path / "before"
    shutil.copytree(folder / "weights", before)
    SegmentedTable(folder / "weights", 30).compact_segments(stride=1, target_bytes=1e6, spare=1)
    assert segment_files(folder / "weights") == ["00000001-00000025.parquet", "00000026-00000030.parquet"]
    shutil.copytree(before, folder / "weights", dirs_exist_ok=True)
    assert len(segment_files(folder / "weights")) == 7
    assert_exact(folder, list(range(1, 31)))
    captured_run(folder, range(31, 33), after_step=30)
    assert_exact(folder, list(range(1, 33)))
    assert segment_files(folder / "weights")[0] == "00000001-00000025.parquet"
    assert len(segment_files(folder / "weights")) == 3


def test_a_merge_goes_around_a_damaged_segment(folder: Path, logged: pytest.LogCaptureFixture) -> None:
    captured_run(folder, range(1, 31))
    content = bytearray((folder / "weights/00000011-00000015.parquet").read_bytes())
    content[20] ^= 0xFF  # within a page: the footer is as it was
    (folder / "weights/00000011-00000015.parquet").write_bytes(content)
    table = SegmentedTable(folder / "weights", 30)
    for _ in range(2):
        table.compact_segments(stride=1, target_bytes=1e6, spare=0)
    assert segment_files(folder / "weights") == [
        *("00000001-00000010.parquet", "00000011-00000015.parquet", "00000016-00000030.parquet")
    ]
    store = LensStore(folder)
    assert store.series("weights", "norm").steps.tolist() == [*range(1, 11), *range(16, 31)]
    assert len(store.damaged) == 1 and "11-15 is lost" in logged.text


def test_a_reader_sees_all_steps_while_segments_are_merged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured_run(folder, range(1, 31))
    listed = []

    def listed_before_the_merge(table: Path) -> list[TableSegment]:
        listed.append(list_segments(table))
        if len(listed) == 3:  # two are to know the tables
            SegmentedTable(table, 30).compact_segments(stride=1, target_bytes=1e6, spare=0)
        return listed[-1]

    monkeypatch.setattr("training_lens.core.lens_store.list_segments", listed_before_the_merge)
    assert LensStore(folder).table("loss").num_rows == 30
    assert len(segment_files(folder / "loss")) == 1


def test_snapshots_keep_within_their_limit_with_the_first_and_the_last(folder: Path) -> None:
    lens = writer(folder, snapshots_megabytes=1)
    for step in range(1, 21):
        lens.add("weights", step, Captured(tensors={"a": torch.full((50_000,), float(step))}))
        lens.flush()
        assert lens.size <= 1_000_000
    store = LensStore(folder)
    steps = store.snapshot_steps("weights")
    assert steps[0] == 1 and steps[-1] == 20 and 3 <= len(steps) <= 4
    for step in steps:
        assert (store.snapshot("weights", step)["a"] == step).all()
    with pytest.raises(LensError, match=r"no snapshot of step 2; there are: 1, "):
        store.snapshot("weights", 2)


def test_snapshots_that_cannot_fit_are_not_kept(folder: Path, logged: pytest.LogCaptureFixture) -> None:
    lens = writer(folder, snapshots_megabytes=1)
    for step in (1, 2):
        lens.add("weights", step, Captured(tensors={"a": torch.zeros(300_000)}))
    lens.add("weights", 3, Captured(tensors={"a": torch.zeros(200_000)}))
    lens.add("sketches", 3, Captured(tensors={"a": torch.zeros(200_000)}))
    lens.close()
    store = LensStore(folder)
    assert store.snapshot_steps("weights") + store.snapshot_steps("sketches") == [3]
    assert logged.text.count("lens.snapshots_megabytes") == 1
    none = writer(folder, snapshots_megabytes=0)
    none.add("weights", 1, Captured(tensors={"a": torch.zeros(2)}))
    none.close()
    assert LensStore(folder).tables() == ()


@pytest.mark.parametrize(
    ("captured", "said"),
    [
        (Captured({"norm": torch.ones(2)}, rows=ROWS), r"weights: norm at step 1 has shape \(2,\).*3 rows"),
        (Captured(vectors={"spectrum": [torch.ones(2)]}, rows=ROWS), "weights: spectrum at step 1 has 1 vectors"),
    ],
)
def test_values_that_do_not_fit_their_rows_are_refused(folder: Path, captured: Captured, said: str) -> None:
    with pytest.raises(LensError, match=said):
        writer(folder).add("weights", 1, captured)


@pytest.mark.parametrize(
    "captured",
    [
        Captured({"step": torch.ones(3)}, rows=ROWS),
        Captured({"a": torch.ones(3)}, {"a": [torch.ones(1)] * 3}, rows=ROWS),
        Captured({"a": torch.ones(2)}, rows=("x", "x")),
    ],
)
def test_duplicate_names_are_refused(captured: Captured) -> None:
    with pytest.raises(LensError, match=r"are called '(step|a|x)'"):
        arrow_table([(1, captured)])


def test_a_table_name_must_be_a_folder_name(folder: Path) -> None:
    with pytest.raises(LensError, match="cannot name a table"):
        writer(folder).add("../weights", 1, norms(1))


def test_unknown_names_suggest_the_nearest(folder: Path) -> None:
    captured_run(folder, range(1, 3))
    store = LensStore(folder)
    with pytest.raises(LensError, match=r"no table 'weight'\. Did you mean 'weights'"):
        store.table("weight")
    with pytest.raises(LensError, match=r"no measure is called 'cosin'\. Did you mean 'cosine'"):
        store.series("weights", "cosin")
    with pytest.raises(LensError, match="read it with series"):
        store.vectors("weights", "norm")
    with pytest.raises(LensError, match="read it with vectors"):
        extract_series(arrow_table([(1, Captured(vectors={"s": [torch.ones(1)]}))]), "s")


def test_numbers_and_vectors_of_one_name_are_refused(folder: Path) -> None:
    lens = writer(folder)
    for step, captured in enumerate([norms(1), Captured(vectors={"norm": [torch.ones(1)] * 3}, rows=ROWS)], 1):
        lens.add("weights", step, captured)
        lens.flush()
    with pytest.raises(LensError, match="a measure as numbers and as vectors"):
        LensStore(folder).table("weights")


def test_a_folder_without_captures_says_so(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(LensError, match=r"no captures.*lens\.enabled=false"):
        LensStore(tmp_path)
    writer(folder)
    write_sealed(folder / "lens.json", {**read_sealed(folder / "lens.json"), "format": 2})
    with pytest.raises(LensError, match="format 2; this version reads format 1"):
        LensStore(folder)
    for broken in ("{", "[]", '{"format": 1}'):
        (folder / "lens.json").write_text(broken)
        with pytest.raises(LensError, match=r"lens\.json is damaged"):
            LensStore(folder)


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """Within the block, writing more into one file fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_an_error_and_unwritten_captures_stay_pending(folder: Path) -> None:
    lens = captured_run(folder, range(1, 6))
    lens.add("weights", 6, Captured(norms(6).scalars, tensors={"a": torch.ones(5000)}, rows=ROWS))
    for most_bytes, steps in ((100, 5), (10_000, 6)):  # too small for a segment; for the snapshot alone
        with (
            files_of_at_most(most_bytes),
            pytest.raises(LensError, match=rf"cannot be written in {folder}.*Free space"),
        ):
            lens.flush()
        assert_exact(folder, list(range(1, steps + 1)))
    lens.flush()
    assert_exact(folder, list(range(1, 7)))
    assert LensStore(folder).snapshot_steps("weights") == [6] and not list(folder.rglob(".tmp-*"))


def test_a_long_series_is_read_in_well_under_a_second(folder: Path) -> None:
    steps, rows = 7000, tuple(f"layers.{i}" for i in range(224))
    values = torch.rand(len(rows))
    table = arrow_table([(step, Captured({"norm": values}, rows=rows)) for step in range(steps)])
    started = time.process_time()
    series = extract_series(table, "norm")
    assert time.process_time() - started < 0.8
    assert series.values.shape == (steps, 224) and pc.sum(table.column("norm")).as_py() == pytest.approx(
        float(series.values.sum()), rel=1e-4
    )
    assert extract_vectors(arrow_table([(1, Captured(vectors={"s": [torch.ones(2)]}))]), "s")[0].tolist() == [1]


@pytest.mark.slow
def test_captures_of_a_running_process_are_those_of_the_store_after_a_flush(folder: Path) -> None:
    """Also with measures that come later, segments that are merged, and tables without a row on disk."""
    one = writer(folder)
    running = RunningCaptures(folder, one.pending_tables)
    assert running.tables() == ()
    for step in range(1, 3 * MAX_SEGMENTS):
        one.add("weights", step, norms(step))
        if step % 50 == 0:
            one.add("loss", step, loss(step))
            one.add("weights", step, Captured({"late": torch.ones(1)}, rows=ROWS[:1]))
            running.refresh()
            seen = running.series("weights", "norm"), running.series("weights", "late"), running.series("loss", "loss")
            measures, points = running.measures("weights"), running.finite_points("loss", "loss")
            one.flush()
            store = LensStore(folder)
            assert measures == store.measures("weights") and running.tables() == store.tables() == ("loss", "weights")
            for found, (table, name) in zip(
                seen, (("weights", "norm"), ("weights", "late"), ("loss", "loss")), strict=True
            ):
                wanted = store.series(table, name)
                assert found.names == wanted.names and np.array_equal(found.steps, wanted.steps)
                np.testing.assert_array_equal(found.values, wanted.values)
            np.testing.assert_array_equal(points, store.finite_points("loss", "loss"))
        elif step % 2:
            one.flush()
    with pytest.raises(LensError, match=r"no table 'weight'\. Did you mean 'weights'"):
        running.table("weight")
    with pytest.raises(LensError, match="no measure is called 'nrm'"):
        running.series("weights", "nrm")
    one.flush()
    running.refresh()
    for columns in (["step"], ["module", "norm"], []):
        seen_table, stored = (each.table("weights", columns) for each in (running, LensStore(folder)))
        assert seen_table.column_names == stored.column_names and seen_table.to_pydict() == stored.to_pydict()
