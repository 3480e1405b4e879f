"""Tokenized splits, cached on disk under a fingerprint of everything that decides their tokens.

A few more examples may stand behind a split's own, in memory alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

import training_lens.data as data_package
from training_lens.data.examples import TokenizedExample
from training_lens.data.notes import refuse_unusable_sources
from training_lens.data.sources import DataSource, expand_sources
from training_lens.data.split_report import SplitCounter, SplitReport
from training_lens.data.token_dataset import TokenDataset, write_examples
from training_lens.data.token_file import TokenTable
from training_lens.data.token_pipeline import Preparation, collect_all_errors, tokenize_chunks
from training_lens.data.tokenization import CharacterCoverage
from training_lens.display.progress import Progress
from training_lens.errors import DamagedFileError, DatasetError
from training_lens.utils.files import atomic_folder, sweep_temporaries
from training_lens.utils.integrity import read_sealed, write_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
EXAMPLES, REPORT = "examples.arrow", "report.json"


@dataclass(frozen=True)
class Split:
    """A tokenized split, its report, the fingerprint of its inputs, and each source's entry in the setting."""

    dataset: TokenDataset
    report: SplitReport
    fingerprint: str
    entries: dict[str, int]


def code_hash() -> str:
    """A hash of this package's source: changed code never reads old caches."""
    digest = hashlib.sha256()
    for file in sorted(Path(str(data_package.__file__)).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def prepare_split(
    specs: Sequence[str], key: str, preparation: Preparation, cache: Path | str, progress: Progress
) -> Split:
    """The tokenized split of the sources that the `specs` of `key` name, from the `cache` if possible.

    Raises:
        DatasetError: missing or broken files, bad rows, or nothing left to learn.
    """
    return prepare_sources(expand_sources(specs, key), key, preparation, Path(cache), progress)


def prepare_sources(
    sources: Sequence[DataSource], key: str, preparation: Preparation, cache: Path, progress: Progress
) -> Split:
    """Like `prepare_split`, for resolved sources."""
    hashes = {source.name: source.sha256 for source in sources}
    fingerprint = _compute_fingerprint(hashes, preparation)
    folder = cache_folder(fingerprint, cache)

    def tokenize_sources() -> None:
        if {source.name: source.sha256 for source in sources} != hashes:
            raise DatasetError(f"{key}: {folder} is damaged, and the files that it was made of have changed since.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(folder.parent, older_than_seconds=86_400)
        with atomic_folder(folder, existing="replace") as building:
            with progress.task(f"tokenizing {key}", sum(s.size_bytes for s in sources), "bytes") as advance:
                counter = _write_tokens(building / EXAMPLES, sources, preparation, advance)
            report = counter.build_report(hashes)
            _refuse_useless_split(report, counter, key, preparation)
            write_sealed(building / REPORT, asdict(report))

    if not folder.is_dir():
        tokenize_sources()
    try:
        dataset, report = _open_split(folder, tokenize_sources)
    except (DamagedFileError, FileNotFoundError) as error:
        logger.warning("%s The rows are tokenized again.", error)
        tokenize_sources()
        dataset, report = _open_split(folder, tokenize_sources)
    return Split(dataset, report, fingerprint, {source.name: source.entry for source in sources})


def _open_split(folder: Path, rebuild: Callable[[], None] | None) -> tuple[TokenDataset, SplitReport]:
    report = SplitReport(**read_sealed(folder / REPORT, required=True))
    return TokenDataset.open(folder / EXAMPLES, rebuild), report


def _write_tokens(
    path: Path, sources: Sequence[DataSource], preparation: Preparation, advance: Callable[[float], None]
) -> SplitCounter:
    """Write the tokens of all sources; returns the counts. The error names all bad rows of all sources."""
    counter = SplitCounter(CharacterCoverage(preparation.encoder))
    try:
        write_examples(path, tokenize_chunks(sources, preparation, counter, advance))
    except DatasetError as error:
        raise (collect_all_errors(sources, preparation) or error) from error
    refuse_unusable_sources(counter.notes, counter.usable)
    return counter


def _compute_fingerprint(hashes: dict[str, str], preparation: Preparation) -> str:
    parts = {
        "files": list(hashes.items()),  # in order: it decides the order of the rows
        "data": preparation.data.model_dump(include=TOKEN_KEYS),
        "seq_len": preparation.seq_len,
        "tokenizer": preparation.tokenizer_hash,
        "code": code_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# The keys of the data section that decide tokens; the others decide which examples are used, and when.
TOKEN_KEYS = {
    *("fields", "ignore_keys", "csv", "on_bad_row", "domain", "template", "date", "mask_prompt", "supervise"),
    *("thinking", "truncation", "special_tokens", "strip_end_marks", "answer_in_prompt"),
}


def _refuse_useless_split(report: SplitReport, counter: SplitCounter, key: str, preparation: Preparation) -> None:
    seq_len = preparation.seq_len
    if preparation.data.answer_in_prompt == "refuse":
        counter.copied.refuse_copies(report.mappings)
    if not report.examples:
        raise DatasetError(
            f"{key}: of {report.rows} rows none has an answer within model.seq_len={seq_len} tokens that this "
            f"tokenizer can say; there is nothing to learn. {report.seq_len_for_99_percent} tokens would keep 99% of "
            "the rows whole."
        )
    if report.answers_truncated == report.examples - counter.texts > 0:
        raise DatasetError(
            f"{key}: the answers of all {report.answers_truncated} examples are cut at model.seq_len={seq_len}: the "
            f"model would never see a whole one. {report.seq_len_for_99_percent} tokens would keep 99% of the rows."
        )


def open_cached_split(fingerprint: str, cache: Path) -> TokenDataset | None:
    """The cached split with this fingerprint, all checksums verified; None if it is not cached.

    Raises:
        DamagedFileError: a checksum differs.
    """
    folder = cache_folder(fingerprint, cache)
    if not folder.is_dir():
        return None
    dataset, _ = _open_split(folder, None)
    dataset.source.require_all_tokens()
    return dataset


def cache_folder(fingerprint: str, cache: Path) -> Path:
    """The cache folder for a fingerprint. It may come from a run's metadata, so it is checked not to be a path."""
    if not re.fullmatch(r"[0-9a-f]{32}", fingerprint[:32]):
        raise DamagedFileError(f"{fingerprint[:80]!r} is no fingerprint of rows, expected hexadecimal digits.")
    return cache / fingerprint[:32]


class JoinedTokens(TokenTable):
    """The columns of a source, then those of others; nothing is copied, and the source verifies its own tokens."""

    def __init__(self, first: TokenTable, others: pa.Table) -> None:
        self._first, self._others, self._joined = first, others, first.table
        super().__init__(pa.concat_tables([first.table, others]))

    def require_tokens(self, row: int) -> None:
        """See `TokenFile.require_tokens`; the source may open its file again."""
        if row >= self._first.table.num_rows:
            return
        self._first.require_tokens(row)
        if self._first.table is not self._joined:
            self._joined = self._first.table
            self.table = pa.concat_tables([self._joined, self._others])


def append_examples(dataset: TokenDataset, examples: Sequence[TokenizedExample]) -> TokenDataset:
    """The dataset with these examples behind its own."""
    own = np.arange(dataset.table.num_rows) if dataset.rows is None else dataset.rows
    added = dataset.table.num_rows + np.arange(len(examples))
    joined = JoinedTokens(dataset.source, TokenDataset.from_examples(examples).table)
    return TokenDataset(joined, np.concatenate([own, added]))
