"""What went into a split and what was lost on the way: counted as rows pass, reported, and logged.

Prompts that hold their own answer are counted, too: a model would learn to copy, and could not answer where there is
nothing to copy. Extraction and choice are tasks: an answer that is a small part of a long prompt gives nothing away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from training_lens.data.columns import EncodedRows, TokenizedRows, count_by_example
from training_lens.data.examples import Example, TextSegment
from training_lens.data.notes import DataNotes, describe_bad_rows
from training_lens.data.tokenization import CharacterCoverage
from training_lens.errors import DatasetError
from training_lens.utils.files import hash_bytes
from training_lens.utils.logging import get_logger

FEWEST_ROWS = 8  # with fewer, a shared text may be chance
SHOWN_ROWS, SHOWN_TEXT = 3, 60
logger = get_logger(__name__)
SHOWN = 6  # names that a line lists
COUNTED = (  # fields of the report that are sums over chunks of rows
    *("rows", "examples", "dropped_without_answer", "dropped_by_weight", "dropped_too_long"),
    *("truncated", "answers_truncated", "supervised_tokens_lost", "tokens", "supervised_tokens"),
)
KEPT_SHARE = 0.99  # share of rows; the report names the seq_len that keeps so many whole


def is_copied_answer(example: Example) -> bool:
    """Whether the last answer is one of its prompt's texts, at least half of all of them, or the end of the last.

    White space does not matter. Earlier answers and tool results are no part of the prompt here: repeating them is
    what chats do.

    Example:
        >>> from training_lens.data.examples import Message
        >>> turns = Message("user", "What is 2 + 2? It is 4"), Message("assistant", "It is 4")
        >>> is_copied_answer(Example(turns, None, "rows.jsonl", 1))
        True
    """
    *asked, last = example.messages
    answer = " ".join(last.text.split())
    texts = [text for m in asked if m.role in ("user", "system") for text in (m.text, m.input) if text]
    if not answer or last.calls or sum(map(len, texts)) < len(answer):
        return False
    texts = [" ".join(text.split()) for text in texts]
    if not any(answer in text for text in texts):
        return False
    if answer in texts or 2 * len(answer) >= sum(map(len, texts)):
        return True
    before = texts[-1].removesuffix(answer)
    return len(before) < len(texts[-1]) and not before[-1:].isalnum()


@dataclass
class CopiedAnswers:
    """Counts the rows of each source whose prompt holds the answer.

    `kinds` are hashes of different copied answers: labels that every prompt lists at its end are few.
    """

    asked: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[str]] = field(default_factory=dict)
    kinds: dict[str, set[int]] = field(default_factory=dict)

    def count_examples(self, examples: Sequence[Example]) -> None:
        """Count examples before they are tokenized; those without a prompt are passed over."""
        for example in examples:
            if example.is_text:
                continue
            self.asked[example.file] += 1
            if is_copied_answer(example):
                self.copied[example.file] += 1
                self.kinds.setdefault(example.file, set()).add(hash_bytes(example.messages[-1].text.strip().encode()))
                shown = self.shown.setdefault(example.file, [])
                if len(shown) < SHOWN_ROWS:
                    shown.append(_describe_row(example))

    def refuse_copies(self, mappings: dict[str, str]) -> None:
        """Refuse a source whose prompts hold their answers in most rows.

        Args:
            mappings: how each source was read.

        Raises:
            DatasetError: names rows, and the settings.
        """
        for source, count in self.copied.items():
            rows = self.asked[source]
            if rows < FEWEST_ROWS or 2 * count <= rows or 2 * len(self.kinds[source]) < count:
                continue
            raise DatasetError(
                f"{source}, read as {mappings[source]}: the answer of {count} of {rows} rows stands in its own prompt, "
                f"so only copying would be learned: {'; '.join(self.shown[source])}. Name the fields of prompt and "
                "answer (data.fields.*), or take the answers out of the prompts. If copying is the task: "
                "data.answer_in_prompt=allow."
            )


def _describe_row(example: Example) -> str:
    prompt, answer = (" ".join(m.text.split()) for m in (example.messages[-2], example.messages[-1]))
    prompt = prompt if len(prompt) <= SHOWN_TEXT else f"...{prompt[-SHOWN_TEXT:]}"
    answer = answer if len(answer) <= SHOWN_TEXT else f"{answer[:SHOWN_TEXT]}..."
    return f"row {example.row}: {prompt!r} -> {answer!r}"


@dataclass(frozen=True)
class SplitReport:
    """What went into a split: its sources with sha256, how each was read, and what was lost.

    `remarks` and `ignored_keys` have counts, by source. `bad_rows` are row numbers by source and reason; they are not
    counted in `rows`. Fields with defaults are missing in reports of older versions.
    """

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
    remarks: dict[str, dict[str, int]] = field(default_factory=dict)
    ignored_keys: dict[str, dict[str, int]] = field(default_factory=dict)
    bad_rows: dict[str, dict[str, list[int]]] = field(default_factory=dict)


@dataclass
class SplitCounter:
    """Counts rows, tokens and losses while one split is prepared; `counts` has the names of the report's fields.

    `texts` are kept examples of plain text, `usable` the readable rows by source.
    """

    coverage: CharacterCoverage
    notes: DataNotes = field(default_factory=DataNotes)
    counts: Counter[str] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)
    by_file: Counter[str] = field(default_factory=Counter)
    usable: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    special_text: Counter[str] = field(default_factory=Counter)
    texts: int = 0
    copied: CopiedAnswers = field(default_factory=CopiedAnswers)

    def count_input(
        self, examples: Sequence[Example], rendered: Sequence[Sequence[TextSegment]], whole: EncodedRows
    ) -> None:
        """Count examples before truncation."""
        self.usable.update(example.file for example in examples)
        self.copied.count_examples(examples)
        self.coverage.count_texts([message.text for example in examples for message in example.messages])
        self.lengths.update(dict(zip(*(each.tolist() for each in np.unique_counts(whole.lengths)), strict=True)))
        self.special_text.update(segment.text for segments in rendered for segment in segments if segment.plain)

    def count_outcomes(
        self, examples: Sequence[Example], whole: EncodedRows, fitted: EncodedRows, kept: np.ndarray
    ) -> None:
        """Count outcomes: kept whole, truncated, or dropped (fully masked, too long, nothing to learn)."""
        texts = np.fromiter((example.is_text for example in examples), bool, len(examples))
        lost = count_by_example(whole.response, whole.offsets) - count_by_example(fitted.response, fitted.offsets)
        muted = whole.lengths == 0
        too_long = ~muted & (fitted.lengths == 0)
        outcomes = {
            "truncated": kept & (fitted.lengths < whole.lengths),
            "answers_truncated": kept & (lost > 0) & ~texts,
            "supervised_tokens_lost": lost[kept],
            "dropped_by_weight": ~kept & muted,
            "dropped_too_long": ~kept & too_long,
            "dropped_without_answer": ~kept & ~muted & ~too_long,
        }
        self.texts += int((kept & texts).sum())
        self.counts.update({"rows": len(examples)} | {name: int(found.sum()) for name, found in outcomes.items()})

    def count_kept_rows(self, rows: TokenizedRows) -> None:
        """Count the examples that are kept."""
        self.by_file.update(rows.files)
        self.domains.update(domain for domain in rows.domains if domain is not None)
        kept = {"examples": len(rows), "tokens": len(rows.input_ids), "supervised_tokens": rows.supervised_counts.sum()}
        self.counts.update({name: int(count) for name, count in kept.items()})

    def build_report(self, hashes: dict[str, str]) -> SplitReport:
        """The report; `hashes` are the sources' sha256."""
        return SplitReport(
            **{name: self.counts[name] for name in COUNTED},
            files=hashes,
            mappings=self.notes.mappings,
            examples_by_file=dict(self.by_file),
            seq_len_for_99_percent=_find_quantile(self.lengths, KEPT_SHARE),
            longest=max(self.lengths, default=0),
            domains=dict(sorted(self.domains.items())),
            characters=self.coverage.characters,
            unknown_characters=dict(self.coverage.unknown.most_common()),
            special_text=dict(self.special_text.most_common()),
            end_marks=dict(self.notes.end_marks),
            remarks=self.notes.remarks,
            ignored_keys=self.notes.ignored_keys,
            bad_rows=self.notes.bad_row_reasons,
        )


def _find_quantile(counts: Counter[int], share: float) -> int:
    """The smallest length that at least this share of examples does not exceed."""
    if not counts:
        return 0
    return int(np.quantile(list(counts), share, weights=list(counts.values()), method="inverted_cdf"))


def log_split(report: SplitReport, key: str, seq_len: int) -> None:
    """Log how the files were read (info) and what was lost (warning)."""
    groups: dict[str, list[str]] = {}
    for file, described in report.mappings.items():
        groups.setdefault(described, []).append(file)
    for described, files in groups.items():
        names = files[0] if len(files) == 1 else f"{len(files)} files"
        logger.info("%s: %s, read as %s", key, names, described)
    for line in describe_remarks(report.remarks, report.ignored_keys):
        logger.info("%s: %s", key, line)
    for line in describe_losses(report, seq_len):
        logger.warning("%s: %s", key, line)


def describe_remarks(remarks: dict[str, dict[str, int]], ignored_keys: dict[str, dict[str, int]]) -> Iterator[str]:
    """One line per remark and per source with ignored keys; arguments as in `SplitReport`."""
    for source, said in remarks.items():
        for sentence, times in said.items():
            yield f"{source}: {sentence}{f' ({times:,} times)' if times > 1 else ''}"
    for source, keys in ignored_keys.items():
        yield f"{source}: not used: the keys {_list_counts(keys)}"


def describe_losses(report: SplitReport, seq_len: int) -> Iterator[str]:
    """One line per difference between the files and what training sees."""
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
            f"{report.supervised_tokens_lost} answer tokens lost; {report.seq_len_for_99_percent} would keep 99% whole"
        )
    if report.unknown_characters:
        shown = ", ".join(f"{c!r} ({n})" for c, n in list(report.unknown_characters.items())[:SHOWN])
        share = sum(report.unknown_characters.values()) / max(1, report.characters)
        yield f"{share:.2%} of the characters have no token in this tokenizer: {shown}"
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
