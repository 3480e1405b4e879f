"""The rows of one table on disk: Parquet segments, each for a range of steps, written whole or not at all.

The segments of a table do not overlap. One within the range of another is a leftover of a merge that was killed, and
is ignored. Numbers are float32, split by byte and compressed (zstd): 2.9 to 3.7 bytes each.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training_lens.core.arrow import MODULE, STEP, concat_tables
from training_lens.core.table_names import NEVER_THINNED
from training_lens.errors import DamagedFileError, LensError
from training_lens.utils.files import atomic_file, sweep_temporaries
from training_lens.utils.integrity import UNSEALED, seal_file, verify_seal
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import describe_shortage

logger = get_logger(__name__)
MAX_SEGMENTS = 64  # segments of one table, above which they are merged
TARGET_BYTES = 8_000_000  # of a merged segment
SEGMENT_NAME = re.compile(r"(\d{8,})-(\d{8,})\.parquet")
UNREADABLE = (OSError, ValueError, pa.ArrowException)  # what a truncated or altered file raises


@dataclass(frozen=True)
class TableSegment:
    """A Parquet file of the steps `first` to `last`; its name keeps that range after thinning."""

    path: Path
    first: int
    last: int
    damaged: bool = False  # found when its rows were read

    @classmethod
    def from_range(cls, folder: Path, first: int, last: int) -> TableSegment:
        return cls(folder / f"{first:08d}-{last:08d}.parquet", first, last)

    @cached_property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    @cached_property
    def stride(self) -> int:
        """Only steps that are multiples of this are left, besides 0 and 1; 0 if the file cannot be read."""
        facts = self._footer_facts
        return facts[0] if facts else 0

    @cached_property
    def has_many_rows(self) -> bool:
        """Whether a step has more than one row; False if the file cannot be read."""
        facts = self._footer_facts
        return facts is not None and facts[1]

    @cached_property
    def _footer_facts(self) -> tuple[int, bool] | None:
        if self.damaged:
            return None
        try:
            verify_seal(self.path)
            metadata = pq.read_metadata(self.path)
            kept = metadata.metadata or {}
            return int(kept[b"stride"]), metadata.num_rows > int(kept[b"steps"])
        except (*UNREADABLE, DamagedFileError, KeyError) as error:
            if describe_shortage(error):
                raise
            logger.warning("%s", describe_damage(self, error))
            return None


def describe_damage(segment: TableSegment, error: Exception) -> str:
    """The message for a segment that cannot be read."""
    return f"{segment.path} is damaged ({error}): what was captured in the steps {segment.first}-{segment.last} is lost"


def list_segments(folder: Path) -> list[TableSegment]:
    """The segments of a table, ascending, without those within another's range."""
    live: list[TableSegment] = []
    for segment in sorted(_list_all_segments(folder), key=lambda s: (s.first, -s.last)):
        if not live or segment.last > live[-1].last:
            live.append(segment)
    return live


def _list_all_segments(folder: Path) -> list[TableSegment]:
    found = [parse_segment_path(path) for path in folder.glob("*.parquet") if path.is_file()]
    return [segment for segment in found if segment]


def parse_segment_path(path: Path) -> TableSegment | None:
    """The segment with this path; None if the name is not a segment's."""
    match = SEGMENT_NAME.fullmatch(path.name)
    return TableSegment(path, int(match[1]), int(match[2])) if match else None


def read_segment(segment: TableSegment, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a segment: step, module, and those of `columns` that it has; None: all.

    Raises:
        LensError: the file is damaged; names it and what is lost.
        FileNotFoundError: it was merged into another segment meanwhile.
    """
    with _open_segment(segment) as file:
        names = file.schema_arrow.names
        wanted = names if columns is None else {STEP, MODULE, *columns}
        return file.read([name for name in names if name in wanted]).replace_schema_metadata(None)


def read_schema(segment: TableSegment) -> pa.Table:
    """A segment's columns, as a table without rows; reads the footer alone. Raises as `read_segment` does."""
    with _open_segment(segment) as file:
        return file.schema_arrow.empty_table().replace_schema_metadata(None)


@contextmanager
def _open_segment(segment: TableSegment) -> Iterator[pq.ParquetFile]:
    try:
        verify_seal(segment.path)
        with pq.ParquetFile(segment.path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise
    except (*UNREADABLE, DamagedFileError) as error:
        if describe_shortage(error):  # the machine's fault, not the file's
            raise
        raise LensError(describe_damage(segment, error)) from error


def write_segment(segment: TableSegment, table: pa.Table, stride: int = 1) -> TableSegment:
    """Write the rows of a segment, whole or not at all, replacing a file of its name."""
    steps = len(np.unique(table.column(STEP).to_numpy()))
    facts = {"stride": str(stride), "steps": str(steps), "sha256": UNSEALED}
    floats = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in table.schema
        if field.name not in (STEP, MODULE)
    ]
    with atomic_file(segment.path) as temporary:
        pq.write_table(
            table.replace_schema_metadata(facts),
            temporary,
            compression="zstd",
            compression_level=3,
            use_dictionary=[STEP, MODULE],
            use_byte_stream_split=floats,
            write_statistics=False,
            write_page_checksum=True,
        )
        seal_file(temporary)
    return TableSegment(segment.path, segment.first, segment.last)


class SegmentedTable:
    """The segments of one table, ascending, as their only writer sees them.

    Args:
        after_step: rows of later steps are dropped.
    """

    def __init__(self, folder: Path, after_step: int) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        sweep_temporaries(folder, older_than_seconds=0)
        self.segments = list_segments(folder)
        _delete_segments(_list_all_segments(folder), self.segments)
        self.segments = [kept for segment in self.segments if (kept := _truncate_segment(segment, after_step))]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self.segments)

    @property
    def stride(self) -> int:
        return max((segment.stride for segment in self.segments), default=1) or 1

    @property
    def can_be_thinned(self) -> bool:
        """Whether steps may be dropped: where a step has more than one row, and the table has no limit of its own."""
        return self.folder.name not in NEVER_THINNED and any(segment.has_many_rows for segment in self.segments)

    def can_halve(self, spare: int) -> bool:
        """Whether doubling the stride may drop steps from the segments, the newest `spare` excepted."""
        old = self.segments[: len(self.segments) - spare]
        return any(segment.stride and self.stride < segment.last for segment in old)

    def last_step(self) -> int | None:
        """The last step with rows; None if there is none, or its segment is damaged."""
        rows = self._read_or_mark(self.segments[-1]) if self.segments else None
        return rows.column(STEP)[-1].as_py() if rows is not None and rows.num_rows else None

    def append(self, table: pa.Table) -> int:
        """Write rows as a new segment, or merge them into those of the same steps; returns the bytes written."""
        steps = table.column(STEP)
        new = TableSegment.from_range(self.folder, steps[0].as_py(), steps[-1].as_py())
        shared = [segment for segment in self.segments if segment.last >= new.first]
        if not shared:
            self.segments.append(write_segment(new, table))
            return self.segments[-1].size
        return self._merge_segments(shared, 1, [table])

    def compact_segments(self, stride: int, target_bytes: float, spare: int) -> int:
        """Merge neighbours up to `target_bytes`, dropping steps that are not multiples of `stride`.

        The newest `spare` segments stay as they are. Returns the bytes written.
        """
        old = self.segments[: len(self.segments) - spare]
        return sum(self._merge_segments(group, stride) for group in _group_neighbours(old, stride, target_bytes))

    def _merge_segments(self, group: Sequence[TableSegment], stride: int, more: Sequence[pa.Table] = ()) -> int:
        """Replace segments by one of their whole range; a reader sees all old segments or the new one."""
        readable = [(segment, table) for segment in group if (table := self._read_or_mark(segment)) is not None]
        if len(readable) < len(group) and not more:
            return 0  # the damaged one stays, so that its loss stays known
        table = concat_tables([*(table for _, table in readable), *more])
        if stride > 1:
            steps = table.column(STEP).to_numpy()
            table = table.filter(pa.array((steps % stride == 0) | (steps <= 1)))
        first = min([segment.first for segment in group] + [t.column(STEP)[0].as_py() for t in more])
        last = max([segment.last for segment in group] + [t.column(STEP)[-1].as_py() for t in more])
        left = min((max(segment.stride, stride) for segment, _ in readable), default=1)
        merged = write_segment(TableSegment.from_range(self.folder, first, last), table, left)
        _delete_segments(group, [merged])
        self.segments = sorted([s for s in self.segments if s not in group] + [merged], key=lambda s: s.first)
        return merged.size

    def _read_or_mark(self, segment: TableSegment) -> pa.Table | None:
        """The rows of a segment; None for a damaged one, which is then marked as damaged."""
        try:
            return read_segment(segment)
        except LensError as error:
            logger.warning("%s", error)
            self.segments[self.segments.index(segment)] = replace(segment, damaged=True)
            return None


def _group_neighbours(segments: Sequence[TableSegment], stride: int, target_bytes: float) -> list[list[TableSegment]]:
    """Neighbours to merge: of one stride after thinning, none damaged, about `target_bytes` together."""
    groups: list[list[TableSegment]] = [[]]
    size = 0.0
    for segment in segments:
        expected = segment.size * min(1, segment.stride / stride)
        same = not groups[-1] or max(groups[-1][-1].stride, stride) == max(segment.stride, stride)
        if not segment.stride or not same or size + expected > target_bytes:
            groups.append([])
            size = 0.0
        if segment.stride:
            groups[-1].append(segment)
            size += expected
    return [group for group in groups if len(group) > 1 or (group and group[0].stride < stride)]


def _truncate_segment(segment: TableSegment, after_step: int) -> TableSegment | None:
    """The segment without its steps after `after_step`; None if none is left."""
    if segment.last <= after_step:
        return segment
    if segment.first > after_step:
        segment.path.unlink()
        return None
    kept = TableSegment.from_range(segment.path.parent, segment.first, after_step)
    try:
        table = read_segment(segment)
    except LensError as error:
        logger.warning("%s", error)
        segment.path.rename(kept.path)  # still damaged, but out of the way of the steps to come
        return replace(kept, damaged=True)
    early = pa.array(table.column(STEP).to_numpy() <= after_step)
    kept = write_segment(kept, table.filter(early), segment.stride)
    segment.path.unlink()
    return kept


def _delete_segments(segments: Sequence[TableSegment], but: Sequence[TableSegment]) -> None:
    kept = {segment.path for segment in but}
    for segment in segments:
        if segment.path not in kept:
            segment.path.unlink(missing_ok=True)


def enforce_size_limit(tables: Collection[SegmentedTable], limit_bytes: int) -> int:
    """Keep tables with several rows per step within `limit_bytes`, and every table within `MAX_SEGMENTS`.

    Beyond the limit, new steps are thinned to their table's stride. While that is not enough, the stride of the largest
    table doubles. The newest segments are not thinned unless they alone take a quarter of the limit. Returns the bytes
    written: over a run, about twice what was added.
    """
    thinned = [table for table in tables if table.can_be_thinned]
    target = max(TARGET_BYTES, sum(table.size for table in tables) / MAX_SEGMENTS)
    spare = int(sum(table.segments[-1].size for table in thinned) < limit_bytes / 4)
    written = 0

    def size() -> int:
        return sum(table.size for table in thinned)

    if size() > limit_bytes:
        written += sum(table.compact_segments(table.stride, target, spare) for table in thinned)
    while size() > limit_bytes and (left := [table for table in thinned if table.can_halve(spare)]):
        largest = max(left, key=lambda table: table.size)
        written += largest.compact_segments(2 * largest.stride, target, spare)
    return written + sum(t.compact_segments(1, target, spare=1) for t in tables if len(t.segments) > MAX_SEGMENTS)
