"""From sources to a tokenized split: rows, examples, text, tokens, one chunk at a time, cached under a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import training_lens.data as data_package
from training_lens.config.schema import DataSection
from training_lens.data.fields import FieldMapping, find_mapping, keys_of, to_example
from training_lens.data.sources import expand, read_rows
from training_lens.data.store import TokenDataset, write_examples
from training_lens.data.templates import Renderer
from training_lens.data.tokenization import Encoded, TextEncoder, fit, mask_of
from training_lens.data.types import Example, Row, TokenizedExample
from training_lens.errors import DatasetError
from training_lens.utils.files import read_json, sha256_of, sweep_temporaries, whole_folder, write_json
from training_lens.utils.logging import get_logger
from training_lens.utils.progress import Progress

logger = get_logger(__name__)
CHUNK = 1000  # rows in memory at a time
LOOKED_AT = 200  # rows whose keys decide the mapping


@dataclass(frozen=True)
class SplitReport:
    """What went into a split: its files with sha256 and mapping, and what was lost on the way."""

    files: dict[str, str]
    mappings: dict[str, str]
    rows: int
    examples: int
    dropped_without_answer: int
    truncated: int
    supervised_tokens_lost: int
    tokens: int
    supervised_tokens: int
    domains: dict[str, int]


@dataclass(frozen=True)
class Split:
    """A tokenized split, its report, and the fingerprint of everything that it came from."""

    dataset: TokenDataset
    report: SplitReport
    fingerprint: str


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


def prepare_split(specs: Sequence[str], key: str, preparation: Preparation, cache: Path, progress: Progress) -> Split:
    """The tokenized split of these sources, from the cache where it is there.

    Args:
        specs: paths, globs or embedded names.
        key: 'data.train' or 'data.validation', for messages.
        cache: folder of all caches; a split appears in it whole or not at all.

    Raises:
        DatasetError: missing or broken files, rows that cannot be used, nothing left to learn.
    """
    files = expand(specs, key)
    hashes = {str(file): sha256_of(file) for file in files}
    fingerprint = _fingerprint(hashes, preparation)
    folder = cache / fingerprint[:32]
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(cache, older_than_seconds=86_400)
        with whole_folder(folder) as building:
            counter = _Counter()
            with progress.task(f"tokenizing {key}", sum(f.stat().st_size for f in files), "bytes") as advance:
                write_examples(building / "examples.arrow", _chunks(files, preparation, counter, advance))
            report = counter.report(hashes)
            _refuse_empty(report, key, preparation.seq_len)
            write_json(building / "report.json", asdict(report))
    report = SplitReport(**read_json(folder / "report.json"))
    return Split(TokenDataset.open(folder / "examples.arrow"), report, fingerprint)


def _fingerprint(hashes: dict[str, str], preparation: Preparation) -> str:
    data = preparation.data
    parts = {
        "files": hashes,
        "fields": data.fields.model_dump(),
        "domain": data.domain.model_dump(),
        "mask_prompt": data.mask_prompt,
        "template": type(preparation.renderer.template).__name__,
        "seq_len": preparation.seq_len,
        "tokenizer": preparation.tokenizer_hash,
        "code": code_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Counter:
    """Counts what passes through the pipeline."""

    def __init__(self) -> None:
        self.mappings: dict[str, str] = {}
        self.domains: dict[str, int] = {}
        self.rows = self.examples = self.dropped = self.truncated = self.lost = self.tokens = self.supervised = 0

    def keep(self, whole: Encoded, kept: TokenizedExample) -> None:
        length = len(kept.input_ids)
        self.examples += 1
        self.truncated += length < len(whole.input_ids)
        self.lost += int(whole.response[length:].sum())
        self.tokens += length
        self.supervised += int(kept.loss_mask[1:].sum())
        if kept.domain is not None:
            self.domains[kept.domain] = self.domains.get(kept.domain, 0) + 1

    def report(self, hashes: dict[str, str]) -> SplitReport:
        return SplitReport(
            hashes,
            self.mappings,
            self.rows,
            self.examples,
            self.dropped,
            self.truncated,
            self.lost,
            self.tokens,
            self.supervised,
            dict(sorted(self.domains.items())),
        )


def _chunks(
    files: Sequence[Path], preparation: Preparation, counter: _Counter, advance: Callable[[float], None]
) -> Iterator[list[TokenizedExample]]:
    for file in files:
        left = file.stat().st_size
        rows = examples_of(file, preparation.data, counter.mappings)
        while chunk := list(islice(rows, CHUNK)):
            counter.rows += len(chunk)
            yield _tokenize(chunk, preparation, counter)
            done = min(left, sum(len(m.text) for e in chunk for m in e.messages))
            advance(done)
            left -= done
        advance(left)


def examples_of(file: Path, data: DataSection, mappings: dict[str, str] | None = None) -> Iterator[Example]:
    """The examples of one file; how it was read is noted in `mappings`.

    Raises:
        DatasetError: an empty file, or as `read_rows`, `find_mapping` and `to_example`.
    """
    rows = read_rows(file)
    first: list[Row] = list(islice(rows, LOOKED_AT))
    if not first:
        raise DatasetError(f"{file}: holds no rows.")
    mapping: FieldMapping = find_mapping(keys_of(first), data.fields, data.domain, str(file))
    if mappings is not None:
        mappings[str(file)] = mapping.describe()
    for row in chain(first, rows):
        yield to_example(row, mapping, data.domain.per_file)


def _tokenize(chunk: list[Example], preparation: Preparation, counter: _Counter) -> list[TokenizedExample]:
    kept: list[TokenizedExample] = []
    rendered = [preparation.renderer.example(example) for example in chunk]
    for example, whole in zip(chunk, preparation.encoder.encode(rendered), strict=True):
        tokenized = _learnable(example, fit(whole, preparation.seq_len), preparation.data.mask_prompt)
        if tokenized is None:
            counter.dropped += 1
        else:
            counter.keep(whole, tokenized)
            kept.append(tokenized)
    return kept


def _learnable(example: Example, encoded: Encoded, mask_prompt: bool) -> TokenizedExample | None:
    """The example with its mask, or None where nothing of its answer is left to learn."""
    if not encoded.response[1:].any():
        return None
    return TokenizedExample(example.id, encoded.input_ids, mask_of(encoded, mask_prompt), example.domain)


def tokenize(
    examples: Sequence[Example], renderer: Renderer, encoder: TextEncoder, seq_len: int, mask_prompt: bool
) -> list[TokenizedExample | None]:
    """Examples in memory to tokens, as `prepare_split` makes them; None where nothing of an answer is left."""
    encoded = encoder.encode([renderer.example(example) for example in examples])
    return [_learnable(e, fit(whole, seq_len), mask_prompt) for e, whole in zip(examples, encoded, strict=True)]


def _refuse_empty(report: SplitReport, key: str, seq_len: int) -> None:
    if not report.examples:
        raise DatasetError(
            f"{key}: of {report.rows} rows none has an answer within model.seq_len={seq_len} tokens; "
            "there is nothing to learn. Raise model.seq_len or shorten the prompts."
        )


def log_split(split: Split, key: str) -> None:
    """Say how the files were read and what was lost; losses are warnings."""
    report = split.report
    for described, files in _grouped(report.mappings).items():
        names = files[0] if len(files) == 1 else f"{len(files)} files"
        logger.info("%s: %s, read as %s", key, names, described)
    if report.dropped_without_answer:
        logger.warning(
            "%s: %d of %d rows dropped: nothing of their answer fits model.seq_len, or has a token in this tokenizer",
            key,
            report.dropped_without_answer,
            report.rows,
        )
    if report.truncated:
        logger.warning(
            "%s: %d of %d examples cut to model.seq_len, %d answer tokens lost",
            key, report.truncated, report.examples, report.supervised_tokens_lost,
        )  # fmt: skip


def _grouped(mappings: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for file, described in mappings.items():
        groups.setdefault(described, []).append(file)
    return groups


def read_examples(specs: Sequence[str], key: str, data: DataSection) -> Iterator[Example]:
    """The examples of these sources as they are, for showing and for generating answers."""
    return (example for file in expand(specs, key) for example in examples_of(file, data))
