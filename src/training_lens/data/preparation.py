"""From sources to a tokenized split: rows, examples, text, tokens, one chunk at a time, cached under a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import training_lens.data as data_package
from training_lens.config.data_sections import DataSection
from training_lens.data.fields import find_mapping, keys_of, strip_end_marks, to_example
from training_lens.data.sources import Source, expand
from training_lens.data.store import TokenDataset, write_examples
from training_lens.data.templates import Renderer
from training_lens.data.tokenization import Coverage, Encoded, TextEncoder, fit, mask_of
from training_lens.data.types import Example, Segment, TokenizedExample
from training_lens.errors import DatasetError
from training_lens.utils.files import read_json, sweep_temporaries, whole_folder, write_json
from training_lens.utils.progress import Progress

CHUNK = 1000  # rows in memory at a time
KEPT_SHARE = 0.99  # of the rows: the seq_len that would keep so many whole is reported


@dataclass(frozen=True)
class SplitReport:
    """What went into a split: its sources with sha256, how each was read, and what was lost on the way."""

    files: dict[str, str]
    mappings: dict[str, str]
    examples_by_file: dict[str, int]
    rows: int
    examples: int
    dropped_without_answer: int
    dropped_by_weight: int
    dropped_too_long: int
    truncated: int
    answers_truncated: int
    supervised_tokens_lost: int
    seq_len_for_99_percent: int
    longest: int
    tokens: int
    supervised_tokens: int
    domains: dict[str, int]
    characters: int
    unknown_characters: dict[str, int]
    special_text: dict[str, int]
    end_marks: dict[str, int]

    @property
    def unknown_share(self) -> float:
        """Characters that have no token in this tokenizer, over all."""
        return sum(self.unknown_characters.values()) / max(1, self.characters)


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


def prepare_split(specs: Sequence[str], key: str, preparation: Preparation, cache: Path, progress: Progress) -> Split:
    """The tokenized split of these sources, from the cache where it is there.

    Args:
        specs: paths, globs, folders, hub ids or embedded names.
        key: 'data.train' or 'data.validation', for messages.
        cache: folder of all caches; a split appears in it whole or not at all.

    Raises:
        DatasetError: missing or broken files, rows that cannot be used, nothing left to learn.
    """
    return prepare_sources(expand(specs, key), key, preparation, cache, progress)


def prepare_sources(
    sources: Sequence[Source], key: str, preparation: Preparation, cache: Path, progress: Progress
) -> Split:
    """As `prepare_split`, of sources that are known."""
    hashes = {source.name: source.sha256 for source in sources}
    fingerprint = _fingerprint(hashes, preparation)
    folder = cache / fingerprint[:32]
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(cache, older_than_seconds=86_400)
        with whole_folder(folder) as building:
            counter = _Counter(Coverage(preparation.encoder))
            with progress.task(f"tokenizing {key}", sum(s.size_bytes for s in sources), "bytes") as advance:
                write_examples(building / "examples.arrow", _chunks(sources, preparation, counter, advance))
            report = counter.report(hashes)
            _refuse_useless(report, counter, key, preparation)
            write_json(building / "report.json", asdict(report))
    report = SplitReport(**read_json(folder / "report.json"))
    entries = {source.name: source.entry for source in sources}
    return Split(TokenDataset.open(folder / "examples.arrow"), report, fingerprint, entries)


def _fingerprint(hashes: dict[str, str], preparation: Preparation) -> str:
    data = preparation.data.model_dump(include=DECIDING)
    parts = {
        "files": list(hashes.items()),  # in their order, which is that of the rows
        "data": data,
        "seq_len": preparation.seq_len,
        "tokenizer": preparation.tokenizer_hash,
        "code": code_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# The keys of the data section that decide tokens; the others decide which examples are taken, and when.
DECIDING = {
    *("fields", "domain", "template", "mask_prompt", "supervise", "thinking"),
    *("truncation", "special_tokens", "strip_end_marks"),
}


@dataclass
class _Counter:
    """Counts what passes through the pipeline."""

    coverage: Coverage
    mappings: dict[str, str] = field(default_factory=dict)
    domains: Counter[str] = field(default_factory=Counter)
    by_file: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    special_text: Counter[str] = field(default_factory=Counter)
    end_marks: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    unanswered: int = 0
    muted: int = 0
    too_long: int = 0
    truncated: int = 0
    answers_cut: int = 0
    texts: int = 0
    lost: int = 0
    tokens: int = 0
    supervised: int = 0

    def see(self, segments: Sequence[Segment], whole: Encoded) -> None:
        """Count an example as it came."""
        self.rows += 1
        self.lengths[len(whole.input_ids)] += 1
        self.special_text.update(s.text for s in segments if s.plain)

    def keep(self, example: Example, whole: Encoded, kept: TokenizedExample, seen: Encoded) -> None:
        """Count an example as it is kept."""
        lost = int(whole.response.sum()) - int(seen.response.sum())
        self.by_file[example.file] += 1
        self.texts += example.is_text
        self.truncated += len(seen.input_ids) < len(whole.input_ids)
        self.answers_cut += lost > 0 and not example.is_text
        self.lost += lost
        self.tokens += len(kept.input_ids)
        self.supervised += int(kept.loss_mask[1:].sum())
        if kept.domain is not None:
            self.domains[kept.domain] += 1

    def drop(self, whole: Encoded, fitted: Encoded | None) -> None:
        """Count an example as it is dropped: all of it muted, too long, or nothing left to learn."""
        if not len(whole.input_ids):
            self.muted += 1
        elif fitted is None:
            self.too_long += 1
        else:
            self.unanswered += 1

    def report(self, hashes: dict[str, str]) -> SplitReport:
        return SplitReport(
            files=hashes,
            mappings=self.mappings,
            examples_by_file=dict(self.by_file),
            rows=self.rows,
            examples=sum(self.by_file.values()),
            dropped_without_answer=self.unanswered,
            dropped_by_weight=self.muted,
            dropped_too_long=self.too_long,
            truncated=self.truncated,
            answers_truncated=self.answers_cut,
            supervised_tokens_lost=self.lost,
            seq_len_for_99_percent=_quantile(self.lengths, KEPT_SHARE),
            longest=max(self.lengths, default=0),
            tokens=self.tokens,
            supervised_tokens=self.supervised,
            domains=dict(sorted(self.domains.items())),
            characters=self.coverage.characters,
            unknown_characters=dict(self.coverage.unknown.most_common()),
            special_text=dict(self.special_text.most_common()),
            end_marks=dict(self.end_marks),
        )


def _quantile(counts: Counter[int], share: float) -> int:
    """The smallest length that so large a share of all is not above."""
    seen, wanted = 0, share * sum(counts.values())
    for length in sorted(counts):
        seen += counts[length]
        if seen >= wanted:
            return length
    return 0


def _chunks(
    sources: Sequence[Source], preparation: Preparation, counter: _Counter, advance: Callable[[float], None]
) -> Iterator[list[TokenizedExample]]:
    for source in sources:
        left = float(source.size_bytes)
        examples = examples_of(source, preparation.data, counter.mappings, counter.end_marks)
        while chunk := list(islice(examples, CHUNK)):
            yield [example for example in tokenize(chunk, preparation, counter) if example is not None]
            done = min(left, sum(len(m.text) for e in chunk for m in e.messages))
            advance(done)
            left -= done
        advance(left)


def present_keys(source: Source) -> dict[str, int]:
    """The keys of a source's rows, all of which are read: a key may show first in the last row.

    Raises:
        DatasetError: an empty source, or as `Source.rows`.
    """
    keys = keys_of(source.rows())
    if not keys:
        raise DatasetError(f"{source.name}: holds no rows.")
    return keys


def examples_of(
    source: Source, data: DataSection, mappings: dict[str, str] | None = None, marks: Counter[str] | None = None
) -> Iterator[Example]:
    """The examples of one source; how it was read is noted in `mappings`, end marks taken off in `marks`.

    Raises:
        DatasetError: an empty source, or as `Source.rows`, `find_mapping` and `to_example`.
    """
    mapping = find_mapping(present_keys(source), data.fields, data.domain, source.name)
    if mappings is not None:
        mappings[source.name] = mapping.describe()
    for row in source.rows():
        example = to_example(row, mapping, data.domain.per_file)
        if data.strip_end_marks:
            example, found = strip_end_marks(example)
            if marks is not None:
                marks.update(found)
        yield example


def tokenize(
    examples: Sequence[Example], preparation: Preparation, counter: _Counter | None = None
) -> list[TokenizedExample | None]:
    """Examples to tokens; None where one is dropped. What happens to them is counted in `counter`."""
    rendered = [preparation.renderer.example(example) for example in examples]
    encoded = _encode(examples, rendered, preparation)
    if counter:
        counter.coverage.add([m.text for e in examples for m in e.messages])
    return [
        _tokenized(example, segments, whole, preparation, counter)
        for example, segments, whole in zip(examples, rendered, encoded, strict=True)
    ]


def _tokenized(
    example: Example, segments: Sequence[Segment], whole: Encoded, preparation: Preparation, counter: _Counter | None
) -> TokenizedExample | None:
    data, encoder = preparation.data, preparation.encoder
    fitted = fit(whole, preparation.seq_len, data.truncation, encoder.bos_id)
    kept = None
    if fitted is not None and learnable(fitted, encoder):
        text = "".join(segment.text for segment in segments)
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        mask = mask_of(fitted, data.mask_prompt)
        kept = TokenizedExample(example.file, example.row, fitted.input_ids, mask, example.domain, digest)
    if counter:
        counter.see(segments, whole)
        counter.keep(example, whole, kept, fitted) if kept and fitted else counter.drop(whole, fitted)
    return kept


def _encode(chunk: Sequence[Example], rendered: list[list[Segment]], preparation: Preparation) -> list[Encoded]:
    """All in one call; where that fails, one by one, to name the row."""
    try:
        return preparation.encoder.encode(rendered)
    except DatasetError:
        for example, segments in zip(chunk, rendered, strict=True):
            try:
                preparation.encoder.encode([segments])
            except DatasetError as error:
                raise DatasetError(f"{example.file}, row {example.row}: {error}") from error
        raise


def learnable(encoded: Encoded, encoder: TextEncoder) -> bool:
    """Whether anything of an answer but end tokens is left to predict."""
    answer = encoded.input_ids[1:][encoded.response[1:]]
    return any(int(token) not in encoder.special_ids for token in answer)


def prompt_as_trained(example: Example, preparation: Preparation) -> list[int]:
    """The tokens before the example's last answer, shortened as in training where the example is too long."""
    prompt = preparation.encoder.prompt_ids(preparation.renderer.prompt_of(example))
    whole = preparation.encoder.encode([preparation.renderer.example(example)])[0]
    lost = len(whole.input_ids) - preparation.seq_len
    if lost <= 0 or preparation.data.truncation == "keep_start":
        return prompt
    front = 1 if prompt[0] == preparation.encoder.bos_id else 0
    return prompt[:front] + prompt[front + lost :]


def _refuse_useless(report: SplitReport, counter: _Counter, key: str, preparation: Preparation) -> None:
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


def read_examples(specs: Sequence[str], key: str, data: DataSection) -> Iterator[Example]:
    """The examples of these sources as they are, for showing and for generating answers."""
    return (example for source in expand(specs, key) for example in examples_of(source, data))
