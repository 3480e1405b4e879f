"""The manifest of a prepared folder: sources of the rows, findings, and contents of its files."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import training_lens
from training_lens.config.schema import TrainingConfig
from training_lens.data.notes import DataNotes
from training_lens.data.sources import MADE_BY
from training_lens.preparation.corpus import Corpus, RowCatalogue
from training_lens.preparation.leakage import LEAK_KINDS
from training_lens.preparation.selection import Selection
from training_lens.preparation.split_files import Form
from training_lens.preparation.statistics import DomainStatistics, LengthStatistics

LISTED = 100  # findings of each kind that the manifest lists


@dataclass(frozen=True)
class RowChoice:
    """The rows that were read, the selection, and the form in which rows are written.

    `notes` are remarks on the sources; `bad` are the bad rows that were left out.
    """

    corpus: Corpus
    catalogue: RowCatalogue
    selection: Selection
    form: Form
    notes: DataNotes
    bad: DataNotes


@dataclass(frozen=True)
class PreparedSplit:
    """One written file: its rows and their tokens in training."""

    file: str
    rows: int
    sha256: str
    lengths: LengthStatistics
    supervised_tokens: int
    domains: dict[str, DomainStatistics]


def _group_findings(selection: Selection) -> dict[str, list[tuple[int, int, float]]]:
    """Kind of finding -> (row, other row, similarity)."""
    found: dict[str, list[tuple[int, int, float]]] = {"duplicates_exact": [], "duplicates_near": []}
    for duplicate in selection.duplicates:
        found[f"duplicates_{duplicate.kind}"].append((duplicate.row, duplicate.original, duplicate.similarity))
    found["conflicting_answers"] = [(row, other, 1.0) for row, other in selection.conflicts]
    for kind in LEAK_KINDS:
        leaks = [leak for leak in selection.leaks if leak.kind == kind]
        found[f"leaks_{kind}"] = [(leak.row, leak.other, leak.similarity) for leak in leaks]
    return found


def find_listed_rows(selection: Selection) -> set[int]:
    """Positions of the rows that the manifest shows."""
    listed = (found[:LISTED] for found in _group_findings(selection).values())
    return {row for row, _, _ in itertools.chain.from_iterable(listed)}


def build_manifest(
    config: TrainingConfig, chosen: RowChoice, splits: dict[str, PreparedSplit], texts: dict[int, str]
) -> dict[str, Any]:
    """The contents of manifest.json.

    Args:
        texts: excerpts of the listed rows (`find_listed_rows`).
    """
    catalogue, selection, bad_rows = chosen.catalogue, chosen.selection, chosen.bad.bad_row_reasons
    remarks, ignored_keys = chosen.notes.remarks, chosen.notes.ignored_keys
    rows = Counter(catalogue.files[file] for file in catalogue.file)
    return {
        "made_by": MADE_BY,
        "version": training_lens.__version__,
        "settings": config.prepare.model_dump(),
        "data": config.data.model_dump(include={"fields", "csv", "on_bad_row", "domain", "strip_end_marks"}),
        "sources": {
            reading.source.name: {
                "sha256": reading.sha256,
                "rows": rows[reading.source.name],
                "read_as": reading.mapping.describe(),
                "remarks": remarks.get(reading.source.name, {}),
                "ignored_keys": ignored_keys.get(reading.source.name, {}),
                "bad_rows": bad_rows.get(reading.source.name, {}),
            }
            for reading in chosen.corpus.readings
        },
        "rows_read": len(catalogue),
        "form": chosen.form,
        **{
            kind: {"rows": len(found), "listed": list(_describe_findings(found[:LISTED], catalogue, texts))}
            for kind, found in _group_findings(selection).items()
        },
        "leaks_removed": selection.removed,
        "splits": {name: asdict(split) for name, split in splits.items()},
    }


def _describe_findings(
    found: Sequence[tuple[int, int, float]], catalogue: RowCatalogue, texts: dict[int, str]
) -> Iterator[dict[str, Any]]:
    for row, other, similarity in found:
        yield {
            "row": catalogue.row_id(row),
            "other": catalogue.row_id(other),
            "similarity": round(similarity, 4),
            "text": texts[row],
        }
