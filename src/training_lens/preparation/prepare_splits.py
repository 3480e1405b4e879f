"""Prepare files of rows as a folder of clean splits, with their tokens in the cache that `train` reads."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training_lens._version import __version__
from training_lens.config.data_sections import DataSection
from training_lens.config.schema import TrainingConfig
from training_lens.data.file_readers import check_csv_settings
from training_lens.data.notes import DataNotes, describe_bad_rows, refuse_unusable_sources
from training_lens.data.row_list import read_excluded_rows
from training_lens.data.sources import MADE_BY, MANIFEST, DataSource, expand_sources
from training_lens.data.split_report import describe_remarks, log_split
from training_lens.data.token_cache import Split, prepare_sources
from training_lens.data.token_pipeline import Preparation, collect_all_errors, find_bad_rows
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.preparation.corpus import Corpus, RowCatalogue, build_catalogue
from training_lens.preparation.deduplication import DROPPED, MATCH_KINDS, RowMatch
from training_lens.preparation.selection import VALIDATION, Selection, select_rows
from training_lens.preparation.split_files import (
    FileFormat,
    Form,
    build_reading_settings,
    choose_form,
    convert_row,
    open_writer,
)
from training_lens.preparation.statistics import (
    DomainStatistics,
    LengthStatistics,
    compute_domain_statistics,
    compute_length_statistics,
)
from training_lens.training.plan import (
    build_preparation,
    read_tokenizer,
    resolve_texts,
    token_cache_folder,
    write_rows_as_files,
)
from training_lens.utils.files import (
    atomic_folder,
    hash_file,
    read_json,
    require_writable,
    sweep_temporaries,
)
from training_lens.utils.integrity import write_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
LISTED = 100  # findings of each kind that the manifest lists
NAMED = 5  # foreign files that an error names
TEXT = 100  # characters of a row shown with a finding


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


@dataclass(frozen=True)
class PreparationResult:
    """What `prepare` wrote.

    `data` are the settings that read the files as their sources were read; `token_lengths` are those of all splits.
    """

    folder: Path
    splits: dict[str, PreparedSplit]
    manifest: dict[str, Any]
    data: DataSection
    token_lengths: np.ndarray


def prepare_splits(config: TrainingConfig, progress: Progress, force: bool = False) -> PreparationResult:
    """Read data.train, keep what `config.prepare` wants, and write it as a folder of splits, whole or not at all.

    Rows of data.validation become the split 'validation' as they are; training rows that they repeat are found.
    Sources are streamed in several passes. Memory: some 50 bytes per row, plus `NearIndex` if near duplicates are
    searched. With `force`, an earlier result in the folder is replaced.

    Raises:
        ConfigurationError: settings that do not apply, or the folder exists.
        TrainingLensError: rows cannot be read, split, written or tokenized.
    """
    config = settle_splits(config)
    base, folder = Path(config.output.base_output_dir), config.prepared_folder
    require_writable(base, "output.base_output_dir")
    config = write_rows_as_files(config, base / "cache" / "rows")
    given = expand_sources(config.data.validation or [], "data.validation")
    sources = [*expand_sources(config.data.train, "data.train"), *given]
    _refuse_shared_sources(sources)
    check_csv_settings(config.data.csv, [source.name for source in sources])
    _require_writable_folder(folder, sources, force)
    if config.prepare.output is None:  # the folder around it is our own: what killed runs left there may go
        sweep_temporaries(folder.parent, older_than_seconds=86_400)
    facts, tokenizer = read_tokenizer(config)
    settled = resolve_texts(config, facts, tokenizer)
    preparation = build_preparation(settled, tokenizer)
    with atomic_folder(folder, existing="replace" if force else "refuse") as building:
        try:
            chosen = _choose_rows(settled, sources, given, preparation, progress)
            texts = _write_splits(chosen, config.prepare.format, building)
            chosen.corpus.require_unchanged()
            reader = settled.model_copy(update={"data": build_reading_settings(chosen.form, settled.data)})
            rereading = build_preparation(reader, tokenizer)
            tokens = _tokenize_splits(building, folder, rereading, token_cache_folder(config), progress)
        except DatasetError as error:  # of bad rows it names one, and perhaps as the row of a file that is not kept
            raise (collect_all_errors(sources, preparation) or error) from error
        splits = {name: _describe_split(building, tokens[name]) for name in chosen.selection.names}
        manifest = build_manifest(config, chosen, splits, texts)
        write_sealed(building / MANIFEST, manifest)
    lengths = np.concatenate([split.dataset.lengths for split in tokens.values()])
    return PreparationResult(folder, splits, manifest, reader.data, lengths)


def _choose_rows(
    settled: TrainingConfig,
    sources: Sequence[DataSource],
    given: Sequence[DataSource],
    preparation: Preparation,
    progress: Progress,
) -> RowChoice:
    """Choose rows; with data.on_bad_row=skip, only those that can be read, rendered and tokenized."""
    bad, left_out = DataNotes(), dict[str, frozenset[int]]()
    if settled.data.on_bad_row == "skip":
        counter = find_bad_rows(sources, preparation)
        refuse_unusable_sources(counter.notes, counter.usable)
        bad = counter.notes
        reasons = bad.bad_row_reasons
        left_out = {source: frozenset(itertools.chain(*rows.values())) for source, rows in reasons.items()}
    for source, numbers in read_excluded_rows(sources, settled.data).items():
        left_out[source] = left_out.get(source, frozenset()) | numbers
    corpus = Corpus.from_sources(sources, settled.data, progress, left_out)
    form = choose_form(corpus, settled.prepare.format)
    notes = DataNotes()
    catalogue = build_catalogue(corpus, settled.prepare.group_field, notes)
    for line in [*describe_remarks(notes.remarks, notes.ignored_keys), *describe_bad_rows(bad.bad_row_reasons)]:
        logger.info("data.train: %s", line)
    is_given = catalogue.find_rows_of([source.name for source in given])
    return RowChoice(corpus, catalogue, select_rows(corpus, catalogue, settled.prepare, is_given), form, notes, bad)


def _refuse_shared_sources(sources: Sequence[DataSource]) -> None:
    """Refuse a file of both data.train and data.validation."""
    names = Counter(source.name for source in sources)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise ConfigurationError(f"data.validation: '{twice}' is in data.train, too. Keep it in one of them.")


def settle_splits(config: TrainingConfig) -> TrainingConfig:
    """The config with prepare.splits resolved from data.val_ratio and data.validation.

    Raises:
        ConfigurationError: settings that do not apply: sampling and weights belong to training.
    """
    data = config.data
    advice = "prepare takes every row of data.train once; leave it out here"
    given = {"weights": data.weights, "max_examples": data.max_examples, "canaries": data.canaries or None}
    problems = [f"data.{key}: {advice}" for key, value in given.items() if value is not None]
    if problems:
        raise ConfigurationError(problems)
    own = config.prepare.model_fields_set
    if data.validation is not None:
        if "splits" in own and VALIDATION in config.prepare.splits:
            raise ConfigurationError(
                "prepare.splits: 'validation' is the split of data.validation. Name the other one otherwise, or leave "
                "out data.validation."
            )
        changes: dict[str, Any] = {} if "splits" in own else {"splits": {"train": 1.0}}
        changes |= {} if "leakage" in own else {"leakage": "remove"}
        logger.info(
            "data.validation is the split 'validation', with every row; training rows that it repeats are %s",
            "left out" if changes.get("leakage", config.prepare.leakage) == "remove" else "kept",
        )
        return config.replace_keys(prepare=changes)
    if "splits" in own:
        if data.val_ratio:
            logger.info("prepare.splits says which rows are held out, and not data.val_ratio")
        return config
    if data.val_ratio:
        held_out = data.val_ratio
        logger.info("data.val_ratio: %g of the rows become the validation split", held_out)
        return config.replace_keys(prepare={"splits": {"train": 1 - held_out, "validation": held_out}})
    return config


def _require_writable_folder(folder: Path, sources: Sequence[DataSource], force: bool) -> None:
    """Check that the folder is new, or that --force may replace an earlier result that no source reads."""
    require_writable(folder.parent, "prepare.output")
    if not folder.exists():
        return
    if not force:
        raise ConfigurationError(
            f"prepare.output: '{folder}' is there already. Give another folder, or replace it with --force."
        )
    if not folder.is_dir():
        raise ConfigurationError(f"prepare.output: '{folder}' is a file. Give a folder.")
    others = sorted(path.name for path in folder.iterdir() if path.name not in find_written_files(folder))
    if others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        raise ConfigurationError(
            f"prepare.output: '{folder}' holds {', '.join(others[:NAMED])}{more}, which prepare did not write, and "
            "--force replaces nothing else. Move what is yours, or give another folder."
        )
    inside = [f for s in sources for f in s.files if folder.resolve() in f.resolve().parents]
    if inside:
        raise ConfigurationError(
            f"prepare.output: '{folder}' holds {inside[0]}, which is to be read. Give another folder."
        )


def find_written_files(folder: Path) -> set[str]:
    """The files that an earlier `prepare` wrote there: the manifest and its files; empty without a manifest."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["made_by"] != MADE_BY:
            return set()
        return {MANIFEST, *(split["file"] for split in manifest["splits"].values())}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()


def _write_splits(chosen: RowChoice, file_format: FileFormat, building: Path) -> dict[int, str]:
    """Write every kept row to its split's file; returns excerpts of the rows that the manifest lists."""
    corpus, selection, form = chosen.corpus, chosen.selection, chosen.form
    listed = {match.row for found in _group_findings(selection).values() for match in found[:LISTED]}
    learned = {key.split(".")[0] for reading in corpus.readings for key in reading.mapping.key_by_meaning.values()}
    texts: dict[int, str] = {}
    has_domain = any(domain is not None for domain in chosen.catalogue.domains)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(closing(open_writer(building / f"{name}.{file_format}", form, has_domain, learned)))
            for name in selection.names
        ]
        for position, (row, example) in chosen.catalogue.enumerate_rows(corpus.read_rows("writing")):
            if position in listed:
                text = " ".join(" ".join(m.text for m in example.messages).split())
                texts[position] = text if len(text) <= TEXT else f"{text[: TEXT - 1]}…"
            if selection.split[position] != DROPPED:
                values = convert_row(row, example, form, corpus.data.domain.per_file)
                writers[selection.split[position]].write(row, values)
    for key, count in sum((writer.emptied for writer in writers), Counter[str]()).items():
        logger.warning("'%s' is NaN or infinite in %d rows, for which JSON has no word; written as null", key, count)
    return texts


def _tokenize_splits(
    building: Path, folder: Path, preparation: Preparation, cache: Path, progress: Progress
) -> dict[str, Split]:
    """Tokenize the splits into the cache, under the names that their files will have in `folder`."""
    splits: dict[str, Split] = {}
    for file in sorted(building.iterdir()):
        name, source = file.stem, DataSource(str(folder / file.name), (file,), entry=0)
        splits[name] = prepare_sources([source], f"the split '{name}'", preparation, cache, progress)
        log_split(splits[name].report, name, preparation.seq_len)
    return splits


def _describe_split(building: Path, split: Split) -> PreparedSplit:
    (path,) = split.report.files
    dataset = split.dataset
    return PreparedSplit(
        file=Path(path).name,
        rows=split.report.rows,
        sha256=hash_file(building / Path(path).name),
        lengths=compute_length_statistics(dataset.lengths),
        supervised_tokens=int(dataset.supervised_counts.sum()),
        domains=compute_domain_statistics(dataset),
    )


def _group_findings(selection: Selection) -> dict[str, list[RowMatch]]:
    """The findings by kind."""
    found = {f"duplicates_{kind}": [m for m in selection.duplicates if m.kind == kind] for kind in ("exact", "near")}
    found["conflicting_answers"] = selection.conflicts
    return found | {f"leaks_{kind}": [m for m in selection.leaks if m.kind == kind] for kind in MATCH_KINDS}


def build_manifest(
    config: TrainingConfig, chosen: RowChoice, splits: dict[str, PreparedSplit], texts: dict[int, str]
) -> dict[str, Any]:
    """The contents of manifest.json; `texts` are excerpts of the rows that it lists."""
    catalogue, selection, bad_rows = chosen.catalogue, chosen.selection, chosen.bad.bad_row_reasons
    remarks, ignored_keys = chosen.notes.remarks, chosen.notes.ignored_keys
    rows = Counter(catalogue.files[file] for file in catalogue.file)
    return {
        "made_by": MADE_BY,
        "version": __version__,
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
            kind: {"rows": len(found), "listed": [_describe_match(each, catalogue, texts) for each in found[:LISTED]]}
            for kind, found in _group_findings(selection).items()
        },
        "leaks_removed": selection.removed,
        "splits": {name: asdict(split) for name, split in splits.items()},
    }


def _describe_match(match: RowMatch, catalogue: RowCatalogue, texts: dict[int, str]) -> dict[str, Any]:
    ids = {"row": catalogue.row_id(match.row), "other": catalogue.row_id(match.other)}
    return {**ids, "similarity": round(match.similarity, 4), "text": texts[match.row]}
