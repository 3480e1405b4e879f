"""What is written to Arrow is read back the same, in any order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training_lens.data.columns import TokenizedRows
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset, write_examples
from training_lens.data.token_file import Checksums
from training_lens.errors import DamagedFileError
from training_lens.utils.integrity import read_sealed


def examples(count: int) -> list[TokenizedExample]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        length = int(rng.integers(1, 9))
        ids = rng.integers(0, 99, length).astype(np.int32)
        made.append(TokenizedExample("f", i, ids, rng.random(length) < 0.5, "ab"[i % 2] if i % 3 else None, i))
    return made


def test_round_trip_over_several_batches(tmp_path: Path) -> None:
    made = examples(25)
    write_examples(tmp_path / "x.arrow", map(TokenizedRows.from_examples, [made[:10], [], made[10:11], made[11:]]))
    for dataset in (TokenDataset.open(tmp_path / "x.arrow"), TokenDataset.from_examples(made)):
        assert len(dataset) == 25
        for a, b in zip(made, dataset, strict=True):
            assert (a.id, a.domain) == (b.id, b.domain)
            assert a.input_ids.tolist() == b.input_ids.tolist() and a.loss_mask.tolist() == b.loss_mask.tolist()
        assert dataset.lengths.tolist() == [len(e.input_ids) for e in made]
        assert dataset.supervised_counts.tolist() == [int(e.loss_mask[1:].sum()) for e in made]
        assert dataset.domains.tolist() == [e.domain for e in made]
        assert dataset.files.tolist() == ["f"] * 25 and dataset.digests.tolist() == list(range(25))


def test_reading_does_not_wait_for_pandas(tmp_path: Path) -> None:
    """pyarrow imports it in many of its conversions: a quarter of a second of each command's start."""
    write_examples(tmp_path / "x.arrow", [TokenizedRows.from_examples(examples(3))])
    code = (
        "import sys; from training_lens.data.token_dataset import TokenDataset as T; d = T.open(sys.argv[1]); "
        "print(len([*d]), len([*d.iterate_columns()]), d.lengths, d.supervised_counts, d.identities, d.ids, d.domains);"
        "sys.exit('pandas' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.arrow")], check=True)


def test_a_selection_is_a_view_in_its_order(tmp_path: Path) -> None:
    made = examples(25)
    write_examples(tmp_path / "x.arrow", [TokenizedRows.from_examples(made)])
    chosen = TokenDataset.open(tmp_path / "x.arrow").select(np.array([7, 3, 20])).select(np.array([2, 0]))
    assert [chosen.example_id(i) for i in range(2)] == ["f:20", "f:7"]
    assert chosen.lengths.tolist() == [len(made[20].input_ids), len(made[7].input_ids)]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def all_of(dataset: TokenDataset) -> list[object]:
    return [(e.id, e.domain, e.digest, e.input_ids.tolist(), e.loss_mask.tolist()) for e in dataset] + [
        dataset.lengths.tolist(),
        dataset.supervised_counts.tolist(),
        dataset.files.tolist(),
        dataset.domains.tolist(),
    ]


def test_no_flipped_bit_is_ever_read(tmp_path: Path) -> None:
    made, path = examples(25), tmp_path / "x.arrow"
    write_examples(path, map(TokenizedRows.from_examples, [made[:10], [], made[10:]]))
    checksums = tmp_path / "x.checksums.json"
    rng = np.random.default_rng(0)
    for file in (path, checksums):
        bits = rng.choice(8 * file.stat().st_size, 120, replace=False).tolist()
        for bit in bits if file == path else [b for b in bits if chr(file.read_bytes()[b // 8]).isalnum()]:
            flip(file, bit)
            with pytest.raises(DamagedFileError):
                all_of(TokenDataset.open(path))
            flip(file, bit)
    for size in range(0, path.stat().st_size, 397):
        content = path.read_bytes()
        path.write_bytes(content[:size])
        with pytest.raises(DamagedFileError):
            TokenDataset.open(path)
        path.write_bytes(content)
    assert all_of(TokenDataset.open(path)) == all_of(TokenDataset.from_examples(made))


def test_tokens_are_compared_where_they_are_read_and_written_anew(tmp_path: Path) -> None:
    made, path = examples(25), tmp_path / "x.arrow"

    def write() -> None:
        write_examples(tmp_path / "new.arrow", map(TokenizedRows.from_examples, [made[:10], made[10:]]))
        for name in ("arrow", "checksums.json"):
            (tmp_path / f"new.{name}").replace(tmp_path / f"x.{name}")

    write()
    token = Checksums(**read_sealed(tmp_path / "x.checksums.json")).tokens[1][0]
    flip(path, 8 * token)
    dataset = TokenDataset.open(path)
    assert dataset[3].input_ids.tolist() == made[3].input_ids.tolist() and dataset.lengths.sum() > 25
    with pytest.raises(DamagedFileError, match="tokens in bytes"):
        dataset[12]
    mended = TokenDataset.open(path, write).select(np.array([24, 12]))
    assert [e.input_ids.tolist() for e in mended] == [made[i].input_ids.tolist() for i in (24, 12)]
