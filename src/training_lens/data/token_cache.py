"""From sources to a tokenized split: rows, examples, text, tokens, one chunk at a time, cached under a fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import training_lens.data as data_package
from training_lens.config.data_sections import DataSection
from training_lens.data.bad_rows import BadRowRule, bad_rows_error, refuse_unusable_sources
from training_lens.data.columns import EncodedRows, TokenizedRows, compute_offsets, find_learnable_rows, truncate_rows
from training_lens.data.examples import Example, TextSegment, TokenizedExample
from training_lens.data.notes import DataNotes
from training_lens.data.source_reader import read_usable_examples, skip_bad_rows
from training_lens.data.sources import DataSource, expand_sources
from training_lens.data.split_report import SplitCounter, SplitReport
from training_lens.data.templates import Renderer
from training_lens.data.token_dataset import TokenDataset, write_examples
from training_lens.data.tokenization import CharacterCoverage, TextEncoder
from training_lens.display.progress import Progress
from training_lens.errors import DamagedFileError, DatasetError
from training_lens.utils.files import atomic_folder, sweep_temporaries
from training_lens.utils.integrity import read_sealed, write_sealed
from training_lens.utils.logging import get_logger
from training_lens.utils.prefetch import prefetch

logger = get_logger(__name__)
EXAMPLES, REPORT = "examples.arrow", "report.json"
CHUNK = 1000  # rows that are tokenized in one call; about five times as many are in memory


@dataclass(frozen=True)
class Split:
    """A tokenized split, its report, and the fingerprint of everything that it came from.

    `entries` gives for each source the entry of the setting that named it.
    """

    dataset: TokenDataset
    report: SplitReport
    fingerprint: str
    entries: dict[str, int]


@dataclass(frozen=True)
class Preparation:
    """Everything that decides the tokens, besides the files."""

    data: DataSection
    renderer: Renderer
    encoder: TextEncoder
    seq_len: int
    tokenizer_hash: str


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what the tokenizer does: its rules, special tokens and chat template."""
    rules = tokenizer.backend_tokenizer.to_str()
    text = json.dumps([rules, str(tokenizer.special_tokens_map), str(tokenizer.chat_template)])
    return hashlib.sha256(text.encode()).hexdigest()


def code_hash() -> str:
    """A hash of this package's source: any change of the code that makes tokens makes new caches."""
    digest = hashlib.sha256()
    for file in sorted(Path(str(data_package.__file__)).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def prepare_split(
    specs: Sequence[str], key: str, preparation: Preparation, cache: Path | str, progress: Progress
) -> Split:
    """The tokenized split of these sources, from the cache where it is there.

    Args:
        specs: paths, globs, folders, hub ids or embedded names.
        key: 'data.train' or 'data.validation', for messages.
        cache: folder of all caches; a split appears in it whole or not at all.

    Raises:
        DatasetError: missing or broken files, rows that cannot be used, nothing left to learn.
    """
    return prepare_sources(expand_sources(specs, key), key, preparation, Path(cache), progress)


def prepare_sources(
    sources: Sequence[DataSource], key: str, preparation: Preparation, cache: Path, progress: Progress
) -> Split:
    """As `prepare_split`, of sources that are known."""
    hashes = {source.name: source.sha256 for source in sources}
    fingerprint = _compute_fingerprint(hashes, preparation)
    folder = cache_folder(fingerprint, cache)

    def tokenize_sources() -> None:
        if {source.name: source.sha256 for source in sources} != hashes:
            raise DatasetError(f"{key}: {folder} is damaged, and the files that it was made of have changed since.")
        _build_split(folder, hashes, sources, key, preparation, progress)

    if not folder.is_dir():
        tokenize_sources()
    dataset, report = _open_or_rebuild(folder, tokenize_sources)
    return Split(dataset, report, fingerprint, {source.name: source.entry for source in sources})


def _open_or_rebuild(folder: Path, rebuild: Callable[[], None]) -> tuple[TokenDataset, SplitReport]:
    try:
        return _open_split(folder, rebuild)
    except (DamagedFileError, FileNotFoundError) as error:
        logger.warning("%s The rows are tokenized again.", error)
        rebuild()
        return _open_split(folder, rebuild)


def _open_split(folder: Path, rebuild: Callable[[], None] | None) -> tuple[TokenDataset, SplitReport]:
    report = SplitReport(**read_sealed(folder / REPORT, required=True))
    return TokenDataset.open(folder / EXAMPLES, rebuild), report


def _build_split(
    folder: Path,
    hashes: dict[str, str],
    sources: Sequence[DataSource],
    key: str,
    preparation: Preparation,
    progress: Progress,
) -> None:
    """Write the folder of a split, or replace a damaged one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(folder.parent, older_than_seconds=86_400)
    with atomic_folder(folder, existing="replace") as building:
        with progress.task(f"tokenizing {key}", sum(s.size_bytes for s in sources), "bytes") as advance:
            counter = _write_tokens(building / EXAMPLES, sources, preparation, advance)
        report = counter.build_report(hashes)
        _refuse_useless_split(report, counter, key, preparation)
        write_sealed(building / REPORT, asdict(report))


def _write_tokens(
    path: Path, sources: Sequence[DataSource], preparation: Preparation, advance: Callable[[float], None]
) -> SplitCounter:
    """Write the tokens of all sources; gives what was counted on the way.

    Raises:
        DatasetError: as `prepare_split`; of bad rows it names all, of all sources.
    """
    counter = SplitCounter(CharacterCoverage(preparation.encoder))
    try:
        write_examples(path, _tokenize_chunks(sources, preparation, counter, advance))
    except DatasetError as error:
        raise (collect_all_errors(sources, preparation) or error) from error
    refuse_unusable_sources(counter.notes, counter.usable)
    return counter


def collect_all_errors(sources: Sequence[DataSource], preparation: Preparation) -> DatasetError | None:
    """What is wrong with rows of these sources, found by preparing them all; None where no row is at fault."""
    try:
        counter = find_bad_rows(sources, preparation)
    except DatasetError as error:
        return error
    return bad_rows_error(counter.notes, counter.usable)


def find_bad_rows(sources: Sequence[DataSource], preparation: Preparation) -> SplitCounter:
    """What there is to count when all sources are prepared without their bad rows: a whole pass, of which nothing is
    kept.

    Raises:
        DatasetError: a source itself is at fault, or has no row that can be read.
    """
    counter = SplitCounter(CharacterCoverage(preparation.encoder))
    skipping = replace(preparation, data=skip_bad_rows(preparation.data))
    for _ in _tokenize_chunks(sources, skipping, counter, lambda _: None):
        pass
    return counter


def _compute_fingerprint(hashes: dict[str, str], preparation: Preparation) -> str:
    data = preparation.data.model_dump(include=TOKEN_KEYS)
    parts = {
        "files": list(hashes.items()),  # in their order, which is that of the rows
        "data": data,
        "seq_len": preparation.seq_len,
        "tokenizer": preparation.tokenizer_hash,
        "code": code_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# The keys of the data section that decide tokens; the others decide which examples are taken, and when.
TOKEN_KEYS = {
    *("fields", "ignore_keys", "csv", "on_bad_row", "domain", "template", "date", "mask_prompt", "supervise"),
    "thinking",
    *("truncation", "special_tokens", "strip_end_marks"),
}


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some examples, and as text."""

    examples: Sequence[Example]
    rendered: list[list[TextSegment]]

    @property
    def character_count(self) -> int:
        return sum(len(message.text) for example in self.examples for message in example.messages)


def _tokenize_chunks(
    sources: Sequence[DataSource], preparation: Preparation, counter: SplitCounter, advance: Callable[[float], None]
) -> Iterator[TokenizedRows]:
    """The sources' tokens; one chunk is read and one judged while the tokenizer, which needs no Python, has a third."""
    left = float(sum(source.size_bytes for source in sources))
    for chunk, whole in prefetch(
        _encode_chunks(prefetch(_render_chunks(sources, preparation, counter)), preparation, counter)
    ):
        yield _select_rows(chunk, whole, preparation, counter)[0]
        done = min(left, chunk.character_count)
        advance(done)
        left -= done
    advance(left)


def _render_chunks(sources: Sequence[DataSource], preparation: Preparation, counter: SplitCounter) -> Iterator[_Chunk]:
    """The examples of all sources, rendered."""
    coming = (e for source in sources for e in read_usable_examples(source, preparation.data, counter.notes))
    while examples := list(islice(coming, CHUNK)):
        yield _render_examples(examples, preparation, counter.notes)


def _render_examples(examples: Sequence[Example], preparation: Preparation, notes: DataNotes) -> _Chunk:
    """The examples as text, without those that the template cannot take where bad rows are skipped."""
    rule, render = BadRowRule.from_data(preparation.data, notes), preparation.renderer.example
    rendered = [rule.try_row(e.file, e.row, partial(render, e, notes)) for e in examples]
    pairs = [(e, segments) for e, segments in zip(examples, rendered, strict=True) if segments is not None]
    return _Chunk([e for e, _ in pairs], [segments for _, segments in pairs])


def _encode_chunks(
    chunks: Iterator[_Chunk], preparation: Preparation, counter: SplitCounter
) -> Iterator[tuple[_Chunk, EncodedRows]]:
    """Each chunk with its tokens; counted here, as what characters the tokenizer lacks is asked of it, too."""
    for chunk in chunks:
        chunk, whole = _encode_chunk(chunk, preparation, counter.notes)
        counter.count_input(chunk.examples, chunk.rendered, whole)
        yield chunk, whole


def tokenize(examples: Sequence[Example], preparation: Preparation) -> list[TokenizedExample | None]:
    """Examples to tokens; None where one is dropped, or cannot be used and bad rows are skipped.

    Raises:
        DatasetError: the template or the tokenizer cannot take a row; names it.
    """
    chunk, whole = _encode_chunk(_render_examples(examples, preparation, DataNotes()), preparation, DataNotes())
    rows, kept = _select_rows(chunk, whole, preparation)
    kept_examples = (example for example, is_kept in zip(chunk.examples, kept.tolist(), strict=True) if is_kept)
    found = {id(example): row for example, row in zip(kept_examples, rows, strict=True)}
    return [found.get(id(example)) for example in examples]


def _select_rows(
    chunk: _Chunk, whole: EncodedRows, preparation: Preparation, counter: SplitCounter | None = None
) -> tuple[TokenizedRows, np.ndarray]:
    """The tokens of the examples that are kept, cut, and which those are, (examples,) bool; counted where asked."""
    data, encoder = preparation.data, preparation.encoder
    fitted = truncate_rows(whole, preparation.seq_len, data.truncation, encoder.bos_id)
    kept = find_learnable_rows(fitted, encoder.special_ids)
    left = fitted.select_tokens(np.repeat(kept, fitted.lengths))
    places = np.flatnonzero(kept).tolist()
    rows = TokenizedRows(
        left.input_ids,
        left.response if data.mask_prompt else np.ones_like(left.response),
        compute_offsets(left.lengths[kept]),
        [chunk.examples[i].file for i in places],
        np.array([chunk.examples[i].row for i in places], dtype=np.int64),
        [chunk.examples[i].domain for i in places],
        _hash_texts([chunk.rendered[i] for i in places]),
    )
    if counter:
        counter.count_outcomes(chunk.examples, whole, fitted, kept)
        counter.count_kept_rows(rows)
    return rows, kept


def _hash_texts(rendered: Sequence[Sequence[TextSegment]]) -> np.ndarray:
    """A hash of each text, (examples,) uint64."""
    texts = ("".join(segment.text for segment in segments) for segments in rendered)
    each = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(each), dtype=">u8").astype(np.uint64)


def _encode_chunk(chunk: _Chunk, preparation: Preparation, notes: DataNotes) -> tuple[_Chunk, EncodedRows]:
    """All in one call; where that fails, one by one, to name the row, or to leave it out where bad rows are skipped."""
    encode, rule = preparation.encoder.encode, BadRowRule.from_data(preparation.data, notes)
    try:
        return chunk, encode(chunk.rendered)
    except DatasetError:
        pairs = list(zip(chunk.examples, chunk.rendered, strict=True))
        usable = [
            p for p in pairs if rule.try_row(p[0].file, p[0].row, partial(_encode_example, *p, encode)) is not None
        ]
    left = _Chunk([example for example, _ in usable], [segments for _, segments in usable])
    return left, encode(left.rendered)


def _encode_example(
    example: Example, segments: list[TextSegment], encode: Callable[[Sequence[Sequence[TextSegment]]], EncodedRows]
) -> EncodedRows:
    try:
        return encode([segments])
    except DatasetError as error:
        raise DatasetError(f"{example.file}, row {example.row}: {error}") from error


def encode_training_prompt(example: Example, preparation: Preparation) -> list[int]:
    """The tokens before the example's last answer, shortened as in training where the example is too long."""
    prompt = preparation.encoder.encode_prompt(preparation.renderer.render_example_prompt(example))
    whole = preparation.encoder.encode([preparation.renderer.example(example)])[0]
    lost = len(whole.input_ids) - preparation.seq_len
    if lost <= 0 or preparation.data.truncation == "keep_start":
        return prompt
    front = 1 if prompt[0] == preparation.encoder.bos_id else 0
    return prompt[:front] + prompt[front + lost :]


def _refuse_useless_split(report: SplitReport, counter: SplitCounter, key: str, preparation: Preparation) -> None:
    seq_len = preparation.seq_len
    if not report.examples:
        raise DatasetError(
            f"{key}: of {report.rows} rows none has an answer within model.seq_len={seq_len} tokens that this "
            f"tokenizer can say; there is nothing to learn. {report.seq_len_for_99_percent} tokens would keep 99 % of "
            "the rows whole."
        )
    if report.answers_truncated == report.examples - counter.texts > 0:
        raise DatasetError(
            f"{key}: the answers of all {report.answers_truncated} examples are cut at model.seq_len={seq_len}: the "
            f"model would never see a whole one. {report.seq_len_for_99_percent} tokens would keep 99 % of the rows."
        )


def open_cached_split(fingerprint: str, cache: Path) -> TokenDataset | None:
    """The split of that fingerprint in the cache, all its tokens compared with their checksums; None: it is not there.

    Raises:
        DamagedFileError: it is damaged.
    """
    folder = cache_folder(fingerprint, cache)
    if not folder.is_dir():
        return None
    dataset, _ = _open_split(folder, None)
    dataset.source.require_all_tokens()
    return dataset


def cache_folder(fingerprint: str, cache: Path) -> Path:
    """Where the cache keeps the split of that fingerprint, which a run's metadata may name: it must be no path."""
    if not re.fullmatch(r"[0-9a-f]{32}", fingerprint[:32]):
        raise DamagedFileError(f"{fingerprint[:80]!r} is no fingerprint of rows, expected hexadecimal digits.")
    return cache / fingerprint[:32]
