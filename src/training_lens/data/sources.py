"""Resolve the entries of data.train (files, globs, saved data sets, hub data sets) to sources of rows."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from training_lens import embedded
from training_lens.config.data_sections import DataSection
from training_lens.data.examples import AddRemark, OnBadRow, Row, SourceFile, ignore_remark
from training_lens.data.file_readers import FORMATS, detect_format, read_file_rows
from training_lens.data.row_keys import ALIASES, plain_name
from training_lens.errors import DamagedFileError, DatasetError
from training_lens.utils.arrow_rows import iterate_arrow_rows
from training_lens.utils.files import hash_file
from training_lens.utils.formatting import suggest_path
from training_lens.utils.hub_access import require_hub
from training_lens.utils.integrity import read_sealed
from training_lens.utils.limits import RECORD_BYTES, read_bytes
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home

logger = get_logger(__name__)
HUB = "hub:"
MANIFEST, MADE_BY = "manifest.json", "training-lens prepare"  # the manifest of `prepare`, and its author entry
# OWNER/NAME[/CONFIG][@REVISION][:SPLIT]
_HUB_SPEC = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[^:]+))?(:(?P<split>\w+))?")

FLATTENED = "each record of '{}' is a row, with the fields around it, numbered from 1"
# Records under such a name may be turns of one chat, which each on its own would lose what was said before.
CHAT_NAME = re.compile("turn|dialog|round|chat|conversation|history|exchange", re.IGNORECASE)
# The names of fields that make an object a row, rather than a holder of rows.
PROMPT_NAMES = frozenset(name for meaning in ("instruction", "messages", "text") for name in ALIASES[meaning])


@dataclass(frozen=True)
class DataSource:
    """A file, or one split of a data set.

    `files` are hashed; `entry` is the index in the setting; `table` is a `datasets.Dataset` if that library reads the
    rows. `name` is the final path, even while the file is still elsewhere.
    """

    name: str
    files: tuple[Path, ...]
    entry: int
    table: Any = None

    def read_rows(
        self, data: DataSection | None = None, on_bad_row: OnBadRow | None = None, add_remark: AddRemark = ignore_remark
    ) -> Iterator[Row]:
        """The rows in order, streamed (except JSON that is not JSON Lines); nested records become rows.

        Args:
            data: how tables are read, and the fields that the user named: a row that has one holds no rows.
            on_bad_row, add_remark: as in `SourceFile`.

        Raises:
            DatasetError: as `file_readers.read_file_rows`.
        """
        data = data or DataSection()
        if self.table is None:
            rows = read_file_rows(SourceFile(self.files[0], data.csv, on_bad_row, add_remark))
            moved = self.name != str(self.files[0])
            rows = (replace(row, file=self.name) for row in rows) if moved else rows
        else:
            values = iterate_arrow_rows(self.table.with_format("arrow").iter(1000))
            rows = (Row(self.name, number, value) for number, value in enumerate(values, 1))
        return _flatten_records(rows, add_remark, [key.split(".")[0] for _, key in data.fields if key])

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def sha256(self) -> str:
        """The file's sha256; for several files, the sha256 of their hashes.

        Raises:
            DatasetError: the file differs from what `prepare` wrote.
        """
        each = [hash_file(file) for file in self.files]
        for file, found in zip(self.files, each, strict=True):
            _require_prepared_hash(file, found)
        return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def _require_prepared_hash(file: Path, found: str) -> None:
    """Refuse a file of a prepared folder whose sha256 differs from the manifest."""
    path = file.parent / MANIFEST
    try:
        text = read_bytes(path, RECORD_BYTES)
    except OSError:
        return
    if MADE_BY.encode() not in text:  # another program's
        return
    way = f"Prepare the rows again with --force; or delete {path} to take them as they are."
    try:
        splits = read_sealed(path)["splits"].values()
    except (DamagedFileError, KeyError) as error:
        raise DatasetError(f"{path} cannot be read ({error}). {way}") from error
    known = {split.get("file"): split.get("sha256") for split in splits}
    if known.get(file.name, found) != found:
        raise DatasetError(
            f"{file} differs from the sha256 in {path}: it was damaged, or changed since `prepare` wrote it. {way}"
        )


def expand_sources(specs: Sequence[object], key: str) -> list[DataSource]:
    """The sources for paths, globs, folders, hub ids and embedded names, in order, without duplicates.

    Raises:
        DatasetError: a missing path or a glob without matches; names `key` and a similar file.
    """
    sources: dict[str, DataSource] = {}
    for entry, spec in enumerate(map(str, specs)):
        if not spec.strip():
            raise DatasetError(f"{key}: an empty path; give a file.")
        for source in _expand_source(spec, entry, key):
            if source.name in sources:
                logger.warning("%s: '%s' is named twice, also by '%s'; it is taken once", key, source.name, spec)
            sources.setdefault(source.name, source)
    return list(sources.values())


def _expand_source(spec: str, entry: int, key: str) -> list[DataSource]:
    if spec.startswith(HUB):
        return [_load_from_hub(spec, entry, key)]
    path = expand_home(embedded.resolve_name(spec))
    if path.is_file():
        return [DataSource(str(path), (path,), entry)]
    folder, _, split = spec.rpartition(":") if not path.exists() and ":" in spec else (spec, "", "")
    if is_saved_dataset(saved := expand_home(folder)):
        return [_load_from_disk(saved, split, entry, key)]
    if path.is_dir():
        readable = sorted(p for p in path.iterdir() if detect_format(p))
        hint = "It holds no such file."
        if readable:
            ending = "".join(readable[0].suffixes[-2:])
            hint = f"To take its {len(readable)} files: {key}='{path}/*{ending}'."
        raise DatasetError(f"{key}: '{spec}' is a folder, expected files ({', '.join(FORMATS)}). {hint}")
    matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())  # noqa: PTH207 (absolute too)
    if not matches:
        raise DatasetError(f"{key}: {_describe_missing(spec, path)}")
    return [DataSource(str(match), (match,), entry) for match in matches]


def _describe_missing(spec: str, path: Path) -> str:
    if glob.has_magic(spec):
        return f"'{spec}' matches no file. Check the folder and the pattern; relative paths start at {Path.cwd()}."
    if spec.startswith(f"{embedded.MODEL}:"):
        return f"'{spec}' is not embedded; there are {embedded.TRAIN} and {embedded.HELDOUT}."
    if not path.parent.is_dir():
        hub = f" For a data set of a hub: {HUB}{spec}." if _HUB_SPEC.fullmatch(spec) else ""
        return f"'{spec}' is not there: no folder '{path.parent}'. Relative paths start at {Path.cwd()}.{hub}"
    if path.exists():
        return f"'{spec}' is a device or pipe, and data is read more than once. Write it to a file."
    return f"'{spec}' is not there.{suggest_path(path)}"


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` saved this folder with save_to_disk."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _load_from_disk(folder: Path, split: str, entry: int, key: str) -> DataSource:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{key}: the data set saved in '{folder}' cannot be read: {error}") from error
    if isinstance(loaded, DatasetDict):
        split = split or "train"
        if split not in loaded:
            raise DatasetError(
                f"{key}: '{folder}' has no split '{split}'; there are {', '.join(loaded)}. Write {folder}:SPLIT."
            )
        loaded = loaded[split]
    elif split:
        raise DatasetError(f"{key}: '{folder}' is one data set without splits; leave out ':{split}'.")
    return _build_table_source(f"{folder}:{split}" if split else str(folder), loaded, entry)


def parse_hub_spec(spec: str, key: str) -> re.Match[str]:
    """The id, config, revision and split of hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT].

    Raises:
        DatasetError: it is written otherwise.
    """
    parts = _HUB_SPEC.fullmatch(spec.removeprefix(HUB))
    if not parts:
        raise DatasetError(f"{key}: '{spec}' is not understood; write {HUB}OWNER/NAME[/CONFIG][@REVISION][:SPLIT].")
    return parts


def _load_from_hub(spec: str, entry: int, key: str) -> DataSource:
    parts = parse_hub_spec(spec, key)
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    split = parts["split"] or "train"
    if not (Path(datasets.config.HF_DATASETS_CACHE) / parts["id"].replace("/", "___").lower()).is_dir():
        require_hub(f"{key}: '{spec}'", DatasetError)
    try:
        loaded = datasets.load_dataset(
            parts["id"], parts["config"], split=split, revision=parts["revision"], keep_in_memory=False
        )
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        line = str(error).strip().split("\n")[0]
        raise DatasetError(
            f"{key}: '{spec}' cannot be had: {line} Check the id, the split and the revision, and (for a gated or "
            "private data set) that you are logged in."
        ) from error
    return _build_table_source(spec, loaded, entry)


def _build_table_source(name: str, table: Any, entry: int) -> DataSource:
    files = tuple(Path(file["filename"]) for file in table.cache_files)
    if not files:
        raise DatasetError(
            f"'{name}' lies in memory alone, without files to tell its content by; save it to disk first."
        )
    return DataSource(name, files, entry, table)


def _flatten_records(rows: Iterable[Row], add_remark: AddRemark, named_fields: Collection[str]) -> Iterator[Row]:
    """The rows; one that only nests records (SQuAD's articles, the topics of an FAQ) becomes a row per record.

    Each record gets the fields around it. Rows behind the first such row are numbered consecutively. A row that has one
    of the fields that the user named is not flattened.
    """
    number = 0
    for row in rows:
        path = () if any(name in row.values for name in named_fields) else _find_records(row.values)
        if not path:
            number = max(row.number, number + 1)
            yield row if number == row.number else replace(row, number=number)
            continue
        add_remark(FLATTENED.format("[].".join(path)))
        for values in _list_records(row.values, path, add_remark):
            number += 1
            yield Row(row.file, number, values)


def _find_records(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that lead through lists to records with a prompt, if only one list does; else ()."""
    nested = {key: items for key, items in values.items() if _holds_objects(items) and not CHAT_NAME.search(str(key))}
    if not nested or any(_is_prompt_name(key) for key in values):
        return ()
    paths = []
    for key, items in nested.items():
        deeper = next(filter(None, map(_find_records, items)), ())
        if deeper or any(_is_prompt_name(name) for item in items for name in item):
            paths.append((key, *deeper))
    return paths[0] if len(paths) == 1 else ()


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


@lru_cache(maxsize=4096)
def _is_prompt_name(key: str) -> bool:
    """Whether a key names a prompt, a chat or a plain text: what makes an object a row."""
    return plain_name(key) in PROMPT_NAMES


def _list_records(values: Mapping[str, Any], path: Sequence[str], add_remark: AddRemark) -> Iterator[dict[str, Any]]:
    """The records at a path, each merged into the fields around it; outer keys that clash get the prefix 'record.'."""
    records: Any = values.get(path[0]) if path else None
    if records == []:
        add_remark(f"lists '{path[0]}' without a record are left out")
    elif not _holds_objects(records):  # a record itself, or a row that cannot be used, which is reported
        yield dict(values)
        return
    for record in records:
        around = {f"record.{k}" if k in record else k: item for k, item in values.items() if k != path[0]}
        yield from _list_records({**around, **record}, path[1:], add_remark)
