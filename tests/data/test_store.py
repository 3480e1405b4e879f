"""What is written to Arrow is read back the same, in any order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training_lens.data.columns import TokenizedRows
from training_lens.data.store import TokenDataset, write_examples
from training_lens.data.types import TokenizedExample


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
    write_examples(tmp_path / "x.arrow", map(TokenizedRows.of, [made[:10], [], made[10:11], made[11:]]))
    for dataset in (TokenDataset.open(tmp_path / "x.arrow"), TokenDataset.of(made)):
        assert len(dataset) == 25
        for a, b in zip(made, dataset, strict=True):
            assert (a.id, a.domain) == (b.id, b.domain)
            assert a.input_ids.tolist() == b.input_ids.tolist() and a.loss_mask.tolist() == b.loss_mask.tolist()
        assert dataset.lengths.tolist() == [len(e.input_ids) for e in made]
        assert dataset.supervised.tolist() == [int(e.loss_mask[1:].sum()) for e in made]
        assert dataset.domains.tolist() == [e.domain for e in made]
        assert dataset.files.tolist() == ["f"] * 25 and dataset.digests.tolist() == list(range(25))


def test_a_selection_is_a_view_in_its_order(tmp_path: Path) -> None:
    made = examples(25)
    write_examples(tmp_path / "x.arrow", [TokenizedRows.of(made)])
    chosen = TokenDataset.open(tmp_path / "x.arrow").select(np.array([7, 3, 20])).select(np.array([2, 0]))
    assert [chosen.example_id(i) for i in range(2)] == ["f:20", "f:7"]
    assert chosen.lengths.tolist() == [len(made[20].input_ids), len(made[7].input_ids)]
