"""The rows of a run, opened from its token cache: what it trained on, validated on, and left out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from training_lens.errors import CheckpointError, ConfigurationError, DamagedFileError, TrainingLensError
from training_lens.runs.run_folder import RunFolder
from training_lens.ui.token_pieces import load_run_tokenizer, read_saved_rules

if TYPE_CHECKING:
    import pyarrow as pa

    from training_lens.config.schema import TrainingConfig
    from training_lens.data.examples import TokenizedExample
    from training_lens.data.token_dataset import TokenDataset
    from training_lens.data.token_pipeline import Preparation

TRAIN, VALIDATION, EXCLUDED = "train", "validation", "excluded"
SPLITS = (TRAIN, VALIDATION, EXCLUDED)


@dataclass(frozen=True)
class NameColumn:
    """A column of few distinct names: `codes` (rows,) are positions in `names`, -1 where a row has none."""

    names: tuple[str, ...]
    codes: np.ndarray

    @classmethod
    def from_names(cls, names: np.ndarray) -> NameColumn:
        """Those of an object array of strings and None."""
        import pyarrow as pa

        encoded = pa.array(names, pa.string()).dictionary_encode()
        return cls(tuple(encoded.dictionary.to_pylist()), encoded.indices.fill_null(-1).to_numpy())

    def find_rows(self, name: str | None) -> np.ndarray:
        """Which rows have this name, (rows,) bool; None: which have none."""
        code = -1 if name is None else self.names.index(name) if name in self.names else -2
        found: np.ndarray = self.codes == code
        return found

    def count_rows(self) -> list[tuple[str | None, int]]:
        """Each name with its number of rows, most first; None for rows without a name, if there are any."""
        counts = np.bincount(self.codes + 1, minlength=len(self.names) + 1).tolist()
        named = sorted(zip(self.names, counts[1:], strict=True), key=lambda item: -item[1])
        return [*((name, count) for name, count in named if count), *([(None, counts[0])] if counts[0] else [])]


@dataclass(frozen=True)
class RowSplit:
    """One split of a run, with what its rows are filtered by."""

    name: str
    dataset: TokenDataset

    @cached_property
    def sources(self) -> NameColumn:
        return NameColumn.from_names(self.dataset.files)

    @cached_property
    def domains(self) -> NameColumn:
        return NameColumn.from_names(self.dataset.domains)

    @cached_property
    def ids(self) -> pa.Array:
        """The id of each row."""
        return join_row_ids(self.dataset)

    def read_row(self, index: int) -> TokenizedExample:
        """One row with its tokens.

        Raises:
            CheckpointError: they are damaged.
        """
        try:
            return self.dataset[index]
        except DamagedFileError as error:
            raise CheckpointError(f"{error} Delete its folder: the rows are then tokenized again.") from error


def join_row_ids(dataset: TokenDataset) -> pa.Array:
    """The ids of all rows at once, see `TokenDataset.example_id`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = pc.cast(pa.array(dataset.row_numbers), pa.string())
    return pc.binary_join_element_wise(pa.array(dataset.files, pa.string()), numbers, ":")


def find_listed_rows(ids: pa.Array, listed: list[str] | pa.Array) -> np.ndarray:
    """The position in `listed` of each of `ids`, (rows,) int64; -1 for one that is not listed."""
    import pyarrow as pa
    import pyarrow.compute as pc

    known = listed if isinstance(listed, pa.Array) else pa.array(listed, pa.string())
    places = pc.index_in(ids, known).fill_null(-1).to_numpy(zero_copy_only=False)
    return np.asarray(places, dtype=np.int64)


class RunRows:
    """The splits of one run, each opened on first use. Thread-safe."""

    def __init__(self, run: RunFolder) -> None:
        from training_lens.config.run_config import read_run_config

        self.run, self.config = run, read_run_config(run)
        self.record = _read_record(run)
        self.lock = threading.RLock()
        self._splits: dict[str, RowSplit] = {}
        self._tokenizer, self._rules = cast(Any, None), cast(Any, None)

    @property
    def split_names(self) -> list[str]:
        """The splits that the run has."""
        has = {
            TRAIN: True,
            VALIDATION: bool(self.record.get("validation_examples")),
            EXCLUDED: bool(self.record.get("excluded")),
        }
        return [name for name in SPLITS if has[name]]

    def open_split(self, name: str) -> RowSplit:
        """One of `split_names`.

        Raises:
            ConfigurationError: the run has no such split.
            TrainingLensError: its rows are no longer there as the run read them.
        """
        if name not in self.split_names:
            raise ConfigurationError(f"split: '{name[:40]}' is none of this run's: {', '.join(self.split_names)}.")
        with self.lock:
            if name not in self._splits:
                self._splits[name] = RowSplit(name, self._select_rows(name))
            return self._splits[name]

    @property
    def token_rules(self) -> Any:
        """The tokenizer's rules (`tokenizers.Tokenizer`), which turn tokens into text; raises as `tokenizer`.

        A finished run has them in a file of its own, which is read in milliseconds and without transformers.
        """
        with self.lock:
            if self._rules is None:
                self._rules = read_saved_rules(self.run) or self.tokenizer.backend_tokenizer
            return self._rules

    @property
    def tokenizer(self) -> Any:
        """The run's own tokenizer, or its model's while it trains; nothing is fetched from a hub.

        Raises:
            ConfigurationError: it carries code that the user has not allowed, or is not on this machine.
        """
        with self.lock:
            if self._tokenizer is None:
                self._tokenizer = load_run_tokenizer(self.run)
            return self._tokenizer

    def _select_rows(self, name: str) -> TokenDataset:
        if name == VALIDATION and not self.config.data.val_ratio:
            return self._open_tokens(VALIDATION)
        everything = self._open_tokens(TRAIN)
        held_out = list(map(str, self.run.read_metadata("held_out.json"))) if self.config.data.val_ratio else []
        excluded = list(map(str, self.record.get("excluded", [])))
        if name != TRAIN:
            return _select_listed(everything, held_out if name == VALIDATION else excluded)
        rows = self._add_canaries(_limit_rows(_drop_listed(everything, [*held_out, *excluded]), self.config))
        if len(rows) != self.record["train_examples"]:
            raise CheckpointError(
                f"the run {self.run.run_id} trained on {self.record['train_examples']:,} rows, and its tokens give "
                f"{len(rows):,}: metadata/data.json or held_out.json is no longer the run's own. Restore it."
            )
        return rows

    def _add_canaries(self, rows: TokenDataset) -> TokenDataset:
        if not self.record.get("canaries"):
            return rows
        from training_lens.data.canaries import Canaries
        from training_lens.data.token_cache import append_examples

        planted = Canaries.from_record(self.record["canaries"]).tokenize_planted(self._build_preparation())
        return append_examples(rows, planted)

    def _open_tokens(self, name: str) -> TokenDataset:
        """The tokens of data.train or data.validation: from the cache, else made anew from unchanged files."""
        from training_lens.config.run_config import locate_outputs

        cache = locate_outputs(self.run) / "cache"
        found = find_cached_tokens(cache, self.record, name)
        return found or self._tokenize_again(name, cache)

    def _tokenize_again(self, name: str, cache: Path) -> TokenDataset:
        from training_lens.data.sources import HUB, expand_sources
        from training_lens.data.token_cache import prepare_sources
        from training_lens.display.progress import Progress

        data, recorded = self.config.data, self.record[name]["files"]
        specs = data.train if name == TRAIN else data.validation_sources
        gone = f"the tokens of {self.run.run_id} are no longer in {cache}"
        if hub := next((str(spec) for spec in specs if str(spec).startswith(HUB)), None):
            raise CheckpointError(
                f"{gone}, and {hub} is on a hub, which the dashboard does not ask. training-lens explain rows "
                f"{self.run.root} reads its rows again."
            )
        try:
            sources = expand_sources(specs, f"data.{name}")
            changed = [source.name for source in sources if recorded.get(source.name) != source.sha256]
        except (TrainingLensError, OSError) as error:
            raise CheckpointError(f"{gone}, and its rows cannot be read again: {error}") from error
        if changed:
            raise CheckpointError(f"{gone}, and {', '.join(changed)} has changed since. Put the old file back.")
        dataset = prepare_sources(sources, f"data.{name}", self._build_preparation(), cache, Progress()).dataset
        if self.record.get("tokens", {}).get(name, dataset.source.content_hash) != dataset.source.content_hash:
            raise CheckpointError(f"{gone}, and this version or another tokenizer makes other ones of the same files.")
        return dataset

    def _build_preparation(self) -> Preparation:
        from training_lens.data.templates import load_template_file, resolve_date
        from training_lens.training.plan import build_preparation

        if not self.run.tokenizer.is_dir():
            load_template_file(self.config.data.template, self.tokenizer)
        date = resolve_date(self.config.data, self.tokenizer)
        return build_preparation(self.config.replace_keys(data={"date": date}), self.tokenizer)


def _read_record(run: RunFolder) -> dict[str, Any]:
    """The run's metadata/data.json.

    Raises:
        CheckpointError: it is not what a run writes.
    """
    record = run.read_metadata("data.json")
    kinds = {"train": dict, "fingerprint": str, "train_examples": int}
    if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise CheckpointError(f"{run.metadata / 'data.json'} does not say which rows the run has read. Restore it.")
    return record


def find_cached_tokens(cache: Path, record: dict[str, Any], name: str) -> TokenDataset | None:
    """The cached tokens of a run's split, whichever version made them and whether or not its files are still there.

    Args:
        record: the run's metadata/data.json.
    """
    expected = record.get("tokens", {}).get(name)
    for folder in _list_cache_folders(cache, record) if expected else ():
        dataset = _open_if_same(folder, record[name], expected)
        if dataset is not None:
            return dataset
    return None


def _list_cache_folders(cache: Path, record: dict[str, Any]) -> Iterator[Path]:
    """The folders of cached splits, that of the run's training rows first."""
    own = cache / str(record["fingerprint"])[:32]
    folders = sorted(path.parent for path in cache.glob("*/report.json"))
    yield from sorted(folders, key=lambda folder: folder != own)


def _open_if_same(folder: Path, report: dict[str, Any], content_hash: str) -> TokenDataset | None:
    """The tokens in a folder if its report and their hash are these; None also where it is damaged."""
    from training_lens.data.token_cache import EXAMPLES, REPORT
    from training_lens.data.token_dataset import TokenDataset
    from training_lens.utils.integrity import read_sealed

    try:
        if read_sealed(folder / REPORT, required=True) != report:
            return None
        dataset = TokenDataset.open(folder / EXAMPLES)
    except (OSError, DamagedFileError):
        return None
    return dataset if dataset.source.content_hash == content_hash else None


def _select_listed(dataset: TokenDataset, listed: list[str]) -> TokenDataset:
    return dataset.select(np.flatnonzero(find_listed_rows(join_row_ids(dataset), listed) >= 0))


def _drop_listed(dataset: TokenDataset, listed: list[str]) -> TokenDataset:
    if not listed:
        return dataset
    return dataset.select(np.flatnonzero(find_listed_rows(join_row_ids(dataset), listed) < 0))


def _limit_rows(dataset: TokenDataset, config: TrainingConfig) -> TokenDataset:
    from training_lens.data.batching import limit_examples

    return limit_examples(dataset, config.data.max_examples, config.training.seed)
