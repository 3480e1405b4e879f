"""Exported files give back what was captured, in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from training_lens.analysis.exporting import WRITERS, export_tables
from training_lens.analysis.open_recording import open_recording
from training_lens.core import table_names as tables
from training_lens.core.arrow import arrow_table
from training_lens.core.recording import Recording
from training_lens.core.types import Captured, DataType, ModuleRecord
from training_lens.errors import LensError, OutputError

TWO = (ModuleRecord("q", 0, "q", 2, 8, 8, 1.0), ModuleRecord("v", 0, "v", 2, 8, 8, 1.0))
SPECTRA = np.array([[[3.0, 1.0], [0.5, np.nan]], [[4.0, 0.25], [np.inf, 2.0]]])  # (steps, modules, values)


@pytest.fixture
def recording(record: Callable[..., Recording]) -> Recording:
    """Spectra of two modules with a NaN and an infinity, snapshots, and losses that are taken at different steps."""
    norms = {"norm_update": [[1.0, 2.0], [np.nan, 4.0]]}
    spectra = {"singular_values": SPECTRA, "effective_rank": [[1.5, 1.0], [1.25, 2.0]]}
    snapshot = {f"{name}.{part}": torch.ones(2, 2) for name in "qv" for part in "ab"}
    content = {tables.WEIGHTS: ([1, 2], norms), tables.SPECTRA: ([1, 2], spectra)}
    return record(content, of=TWO, snapshots={2: snapshot})


def exported(recording: Recording, format: str, folder: Path) -> Path:
    files = export_tables(recording, DataType.ADAPTER_WEIGHTS, format, folder)
    assert files == {folder / f"adapter_weights.{format}": 4, folder / f"spectra.{format}": 4}
    return folder / f"spectra.{format}"


def test_parquet_has_every_row_and_its_lists(recording: Recording, tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(exported(recording, "parquet", tmp_path / "out"))
    np.testing.assert_array_equal(np.array(table.column("singular_values").to_pylist()), SPECTRA.reshape(4, 2))
    assert table.column("module").to_pylist() == ["q", "v", "q", "v"]
    assert table.column("step").to_pylist() == [1, 1, 2, 2]


def test_csv_joins_a_list_by_spaces(recording: Recording, tmp_path: Path) -> None:
    table = pyarrow.csv.read_csv(exported(recording, "csv", tmp_path / "out"))
    rows = [[float(value) for value in row.split(" ")] for row in table.column("singular_values").to_pylist()]
    np.testing.assert_array_equal(np.array(rows), SPECTRA.reshape(4, 2))
    assert table.column("module").to_pylist() == ["q", "v", "q", "v"]


def test_json_has_null_for_what_is_not_finite(recording: Recording, tmp_path: Path) -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    rows = json.loads(exported(recording, "json", tmp_path / "out").read_text(), parse_constant=refuse)
    assert [row["singular_values"] for row in rows] == [[3.0, 1.0], [0.5, None], [4.0, 0.25], [None, 2.0]]
    assert rows[2] == {"step": 2, "module": "q", "singular_values": [4.0, 0.25], "effective_rank": 1.25}


def test_npz_has_an_array_of_steps_by_modules(recording: Recording, tmp_path: Path) -> None:
    with np.load(exported(recording, "npz", tmp_path / "out")) as arrays:
        np.testing.assert_array_equal(arrays["steps"], [1, 2])
        assert arrays["modules"].tolist() == ["q", "v"]
        np.testing.assert_array_equal(arrays["effective_rank"], [[1.5, 1.0], [1.25, 2.0]])
        np.testing.assert_array_equal(arrays["singular_values"], SPECTRA)


def test_npz_puts_measures_of_different_steps_on_one_grid(tmp_path: Path) -> None:
    """As of validation, whose base_loss is of step 0 alone."""
    taken = [(0, "base_loss", 3.0), (5, "loss", 2.0), (9, "loss", 1.0)]
    table = arrow_table([(step, Captured({measure: torch.tensor([value])})) for step, measure, value in taken])
    WRITERS["npz"](table, tmp_path / "evaluation.npz")
    with np.load(tmp_path / "evaluation.npz") as arrays:
        np.testing.assert_array_equal(arrays["steps"], [0, 5, 9])
        np.testing.assert_array_equal(arrays["base_loss"], [[3.0], [np.nan], [np.nan]])
        np.testing.assert_array_equal(arrays["loss"], [[np.nan], [2.0], [1.0]])


def test_npz_pads_spectra_of_different_ranks(save_adapter: Callable[..., Path], tmp_path: Path) -> None:
    layers = "model.layers.0.self_attn"
    ranks = {f"{layers}.q_proj": 2, f"{layers}.v_proj": 3}
    folder = save_adapter("mixed", {name: (torch.eye(r, 8), torch.eye(8, r)) for name, r in ranks.items()})
    export_tables(open_recording(folder), DataType.ADAPTER_WEIGHTS, "npz", tmp_path)
    with np.load(tmp_path / "spectra.npz") as arrays:
        filled = np.isfinite(arrays["singular_values"][0]).sum(1)
        assert dict(zip(arrays["modules"].tolist(), filled.tolist(), strict=True)) == ranks


@pytest.mark.parametrize("format", WRITERS)
def test_a_file_is_written_over_only_by_force(recording: Recording, tmp_path: Path, format: str) -> None:
    file = exported(recording, format, tmp_path)
    file.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--force"):
        export_tables(recording, DataType.ADAPTER_WEIGHTS, format, tmp_path)
    assert file.read_bytes() == b"mine"
    export_tables(recording, DataType.ADAPTER_WEIGHTS, format, tmp_path, force=True)
    assert file.read_bytes() != b"mine"


def test_what_was_not_captured_is_refused_with_what_there_is(recording: Recording, tmp_path: Path) -> None:
    with pytest.raises(LensError, match=r"no adapter_gradients were captured. There are: adapter_weights\."):
        export_tables(recording, DataType.ADAPTER_GRADIENTS, "csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_that_lens_json_does_not_know_stays_where_it_is(recording: Recording, tmp_path: Path) -> None:
    (recording.folder / "mine").mkdir()
    source = next((recording.folder / tables.SPECTRA).glob("*.parquet"))
    (recording.folder / "mine" / source.name).write_bytes(source.read_bytes())
    exported(recording, "csv", tmp_path / "out")
