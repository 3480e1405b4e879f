"""What the user is told of a split: how it was read, and everything that was lost or changed on the way."""

from __future__ import annotations

from collections.abc import Iterator

from training_lens.data.bad_rows import describe_bad_rows
from training_lens.data.split_report import SplitReport
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
SHOWN = 6


def log_split(report: SplitReport, key: str, seq_len: int) -> None:
    """Say it: how the files were read as information, losses as warnings."""
    for described, files in _group_by_mapping(report.mappings).items():
        names = files[0] if len(files) == 1 else f"{len(files)} files"
        logger.info("%s: %s, read as %s", key, names, described)
    for line in describe_remarks(report.remarks, report.ignored_keys):
        logger.info("%s: %s", key, line)
    for line in describe_losses(report, seq_len):
        logger.warning("%s: %s", key, line)


def describe_remarks(remarks: dict[str, dict[str, int]], ignored_keys: dict[str, dict[str, int]]) -> Iterator[str]:
    """A line for each thing that was noted of a source as it was read; both as in `SplitReport`."""
    for source, said in remarks.items():
        for sentence, times in said.items():
            yield f"{source}: {sentence}{f' ({times:,} times)' if times > 1 else ''}"
    for source, keys in ignored_keys.items():
        yield f"{source}: set aside, since nothing reads them: the keys {_list_counts(keys)}"


def describe_losses(report: SplitReport, seq_len: int) -> Iterator[str]:
    """A line for each thing that training on this split would not see as the files have it."""
    yield from describe_bad_rows(report.bad_rows)
    if report.dropped_too_long:
        yield f"{report.dropped_too_long} of {report.rows} rows dropped: longer than model.seq_len={seq_len}"
    if report.dropped_without_answer:
        yield (
            f"{report.dropped_without_answer} of {report.rows} rows dropped: nothing of their answer fits "
            f"model.seq_len={seq_len}, or has a token in this tokenizer"
        )
    if nothing := [file for file in report.files if not report.examples_by_file.get(file)]:
        yield f"nothing is left of {', '.join(nothing[:SHOWN])}{' and more' if len(nothing) > SHOWN else ''}"
    if report.dropped_by_weight:
        yield f"{report.dropped_by_weight} of {report.rows} rows dropped: their answers are marked as not to be learned"
    if report.truncated:
        yield (
            f"{report.truncated} of {report.examples} examples cut to model.seq_len={seq_len}, "
            f"{report.supervised_tokens_lost} answer tokens lost; {report.seq_len_for_99_percent} would keep 99 % whole"
        )
    if report.unknown_characters:
        shown = ", ".join(f"{c!r} ({n})" for c, n in list(report.unknown_characters.items())[:SHOWN])
        yield f"{report.unknown_share:.2%} of the characters have no token in this tokenizer: {shown}"
    if report.special_text:
        yield (
            f"names of special tokens in the rows are read as plain text: {_list_counts(report.special_text)} "
            "(data.special_tokens=allow reads them as tokens, for rows that already carry a chat template's; BOS and "
            "EOS in them are not added twice)"
        )
    if report.end_marks:
        yield (
            f"literal end marks taken off the ends of answers: {_list_counts(report.end_marks)} "
            "(data.strip_end_marks=false keeps them)"
        )


def _list_counts(counts: dict[str, int]) -> str:
    more = f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
    return ", ".join(f"'{name}' ({count})" for name, count in list(counts.items())[:SHOWN]) + more


def _group_by_mapping(mappings: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for file, described in mappings.items():
        groups.setdefault(described, []).append(file)
    return groups
