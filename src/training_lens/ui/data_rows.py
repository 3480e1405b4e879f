"""The Data page: the rows of a run as the model sees them, filtered, sorted and searched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from training_lens.errors import ConfigurationError, TrainingLensError
from training_lens.ui.row_filters import FoundRows, RowFilters, Sort
from training_lens.ui.token_pieces import build_decode, decode_pieces, find_mark_ends
from training_lens.ui.web import Outputs, json_response, read_number
from training_lens.utils.formatting import pluralize

if TYPE_CHECKING:
    from training_lens.data.split_report import SplitReport
    from training_lens.ui.browsed_rows import BrowsedRows, OpenedRuns
    from training_lens.ui.data_splits import RowSplit
    from training_lens.ui.row_marks import RowMarks

MOST_ROWS, ROWS = 100, 25  # of an answer
MOST_ROW = 10**12  # the largest offset of a request
LONGEST_LISTED, LONGEST_SHOWN = 4_000, 32_000  # tokens of a row, in a list and alone
BINS = 24  # of the histogram of lengths
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
MOST_NAMES = 1_000  # sources or domains that a summary lists
LONGEST_NUMBER, LARGEST_NUMBER = 30, 1e30  # characters of a number in a request, and its size
MEANINGS = {
    "train": "the loss at the row's newest visit, before that step's update, in nats per supervised token",
    "validation": "the loss at the newest validation of the row, in nats per supervised token",
}


def summarize_run(rows: BrowsedRows) -> dict[str, Any]:
    """What the run's splits hold; one whose rows are gone has an error instead.

    Raises:
        TrainingLensError: no split can be read.
    """
    splits: list[dict[str, Any]] = []
    errors: list[TrainingLensError] = []
    for name in rows.split_names:
        try:
            splits.append(summarize_split(rows, rows.open_split(name)))
        except TrainingLensError as error:
            errors.append(error)
            splits.append({"name": name, "error": str(error)})
    if len(errors) == len(splits):
        raise errors[0]
    return {"splits": splits, "notes": list(describe_selection(rows))}


def summarize_split(rows: BrowsedRows, split: RowSplit) -> dict[str, Any]:
    """The numbers of one split, and how its files were read."""
    marks, lengths = rows.read_marks(split), split.dataset.lengths
    return {
        "name": split.name,
        "rows": len(split.dataset),
        "tokens": int(lengths.sum()),
        "supervised": int(split.dataset.supervised_counts.sum()),
        "sources": [{"name": name, "rows": count} for name, count in split.sources.count_rows()[:MOST_NAMES]],
        "domains": [{"name": name, "rows": count} for name, count in split.domains.count_rows()[:MOST_NAMES]],
        "lengths": compute_quantiles(lengths),
        "histogram": count_lengths(lengths),
        "losses": summarize_losses(split.name, marks),
        "suspects": [{"name": name, "rows": count} for name, count in marks.count_kinds().items() if count],
        "mappings": list_mappings(rows, split.name),
        "notes": list(describe_split(rows, split.name)),
    }


def compute_quantiles(values: np.ndarray) -> dict[str, float]:
    """Values that the given shares of the values do not exceed; nothing for no values."""
    if not len(values):
        return {}
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf").tolist()
    return dict(zip(QUANTILES, found, strict=True))


def count_lengths(lengths: np.ndarray) -> dict[str, Any]:
    """A histogram of whole numbers: bin i counts those from start + i x width, below the next.

    Example:
        >>> count_lengths(np.array([3, 4, 4, 9]))
        {'start': 3, 'width': 1, 'counts': [1, 2, 0, 0, 0, 0, 1]}
    """
    if not len(lengths):
        return {"start": 0, "width": 1, "counts": []}
    start, last = int(lengths.min()), int(lengths.max())
    width = math.ceil((last - start + 1) / BINS)
    return {"start": start, "width": width, "counts": np.bincount((lengths - start) // width).tolist()}


def summarize_losses(name: str, marks: RowMarks) -> dict[str, Any] | None:
    """How many rows have a loss, and which; None where none has."""
    known = marks.losses[np.isfinite(marks.losses)]
    if not len(known):
        return None
    return {"rows": len(known), "every": marks.every, "meaning": MEANINGS[name], **compute_quantiles(known)}


def list_mappings(rows: BrowsedRows, name: str) -> list[dict[str, str]]:
    """How the fields of each source were read; rows that are held out or left out are read as those of data.train."""
    own = name if name == "validation" and name in rows.record else "train"
    mappings = rows.record[own].get("mappings", {})
    return [{"source": source, "read_as": described} for source, described in mappings.items()][:MOST_NAMES]


def describe_split(rows: BrowsedRows, name: str) -> Iterator[str]:
    """What was noted and lost while the files of a split were read, a sentence each."""
    from training_lens.data.split_report import describe_losses, describe_remarks

    report = _read_report(rows.record[name]) if name != "excluded" and name in rows.record else None
    if report is not None:
        yield from describe_remarks(report.remarks, report.ignored_keys)
        yield from describe_losses(report, rows.config.model.seq_len or 0)


def _read_report(values: dict[str, Any]) -> SplitReport | None:
    from training_lens.data.split_report import SplitReport

    known = {field.name for field in fields(SplitReport)}
    try:
        return SplitReport(**{key: value for key, value in values.items() if key in known})
    except TypeError:  # an earlier version recorded less
        return None


def describe_selection(rows: BrowsedRows) -> Iterator[str]:
    """Which of the rows were trained on, a sentence each."""
    data, record = rows.config.data, rows.record
    if data.val_ratio:
        yield f"The validation rows are {100 * data.val_ratio:.3g}% of data.train, held out at random."
    if data.max_examples is not None:
        yield f"At most {pluralize(data.max_examples, 'row')} of data.train, drawn at random (data.max_examples)."
    if excluded := record.get("excluded"):
        yield f"Left out of data.train (data.exclude): {pluralize(len(excluded), 'row')}."
    if repeated := record.get("repeated_train_examples"):
        yield f"Training rows that repeat another one but for white space: {repeated:,}."
    if shared := record.get("validation_examples_in_train"):
        yield f"Validation rows that are training rows, too: {shared:,}. They make the validation loss too low."
    if canaries := record.get("canaries"):
        planted = sum(row["repeats"] for row in canaries["rows"])
        yield f"Made-up rows that measure what is memorized (data.canaries): {planted:,}, of the source 'canary'."


def show_row(rows: BrowsedRows, split: RowSplit, index: int, longest: int) -> dict[str, Any]:
    """One row: its facts, and its tokens up to `longest` as segments of one mark each."""
    facts, ids, marks = _read_tokens(rows, split, index, longest)
    ends = find_mark_ends(marks)
    pieces = decode_pieces(build_decode(rows.token_rules), ids, ends)
    shown = zip(pieces, ends, strict=True)
    return facts | {"segments": [{"text": text, "supervised": bool(marks[end - 1])} for text, end in shown]}


def show_tokens(rows: BrowsedRows, split: RowSplit, index: int) -> dict[str, Any]:
    """One row with every token; of one character in several tokens, the last has the text."""
    facts, ids, marks = _read_tokens(rows, split, index, LONGEST_SHOWN)
    pieces = decode_pieces(build_decode(rows.token_rules), ids, range(1, len(ids) + 1))
    shown = zip(ids, pieces, marks.tolist(), strict=True)
    return facts | {"tokens": [{"id": token, "text": text, "supervised": mark} for token, text, mark in shown]}


def _read_tokens(
    rows: BrowsedRows, split: RowSplit, index: int, longest: int
) -> tuple[dict[str, Any], list[int], np.ndarray]:
    """A row's facts, its first `longest` tokens, and which of them are targets: never the first."""
    example, marks, length = split.read_row(index), rows.read_marks(split), int(split.dataset.lengths[index])
    is_target = example.loss_mask[:longest].copy()
    is_target[:1] = False
    loss = float(marks.losses[index])
    facts = {
        "index": index,
        "id": example.id,
        "source": example.file,
        "domain": example.domain,
        "length": length,
        "supervised": int(split.dataset.supervised_counts[index]),
        "loss": None if math.isnan(loss) else loss,
        "suspect": marks.read_reason(index),
        "cut": length > longest,
        "left": max(0, length - longest),
    }
    return facts, example.input_ids[:longest].tolist(), is_target


def show_page(rows: BrowsedRows, split: RowSplit, found: FoundRows, page: slice) -> dict[str, Any]:
    """One page of the rows that were found."""
    shown = [show_row(rows, split, index, LONGEST_LISTED) for index in found.positions[page].tolist()]
    return {"split": split.name, "total": len(found.positions), "remark": found.remark, "rows": shown}


def read_filters(request: Request) -> RowFilters:
    """The filters of a query; an empty value filters nothing.

    Raises:
        ConfigurationError: a value is none that a filter takes.
    """
    query = request.query_params
    return RowFilters(
        source=query.get("source") or None,
        domain=query.get("domain") or None,
        without_domain=bool(query.get("without_domain")),
        lengths=(read_bound(request, "min_length", -math.inf), read_bound(request, "max_length", math.inf)),
        losses=(read_bound(request, "min_loss", -math.inf), read_bound(request, "max_loss", math.inf)),
        suspects=query.get("suspects") or None,
        text=query.get("text") or None,
    )


def read_bound(request: Request, name: str, otherwise: float) -> float:
    """A number of the query; `otherwise` where it is missing or empty."""
    text = request.query_params.get(name, "").strip()
    try:
        value = float(text[:LONGEST_NUMBER]) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not abs(value) < LARGEST_NUMBER:  # nan, too
        raise ConfigurationError(f"{name}: '{text[:40]}' is given; expected a number.")
    return otherwise if value is None else value


def read_sort(request: Request) -> Sort:
    """The order of a query."""
    text = request.query_params.get("sort") or "order"
    if text not in get_args(Sort):
        raise ConfigurationError(f"sort: '{text[:40]}' is given; expected one of {', '.join(get_args(Sort))}.")
    return cast(Sort, text)


class DataPages:
    """The answers of the Data page, which keep the rows of few runs open."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs, self._opened = outputs, cast("OpenedRuns | None", None)

    async def send_summary(self, request: Request) -> Response:
        return await self._answer(request, summarize_run)

    async def send_rows(self, request: Request) -> Response:
        filters, sort = read_filters(request), read_sort(request)
        offset, limit = read_number(request, "offset", 0, MOST_ROW), read_number(request, "limit", ROWS, MOST_ROWS)

        def build_page(rows: BrowsedRows) -> dict[str, Any]:
            split = rows.open_split(_read_split(request))
            return show_page(rows, split, rows.find_rows(split, filters, sort), slice(offset, offset + limit))

        return await self._answer(request, build_page)

    async def send_row(self, request: Request) -> Response:
        def build_row(rows: BrowsedRows) -> dict[str, Any]:
            split, index = rows.open_split(_read_split(request)), request.path_params["index"]
            if index >= len(split.dataset):
                raise HTTPException(404, f"There is no row {index}: {split.name} has {len(split.dataset):,} rows.")
            return show_tokens(rows, split, index)

        return await self._answer(request, build_row)

    async def _answer(self, request: Request, build_answer: Callable[[BrowsedRows], dict[str, Any]]) -> Response:
        run = self._outputs.requested_run(request)

        def open_and_answer() -> dict[str, Any]:
            from training_lens.ui.browsed_rows import OpenedRuns

            self._opened = self._opened or OpenedRuns()
            return build_answer(self._opened.open_run(run))

        return json_response(await run_in_threadpool(open_and_answer))


def _read_split(request: Request) -> str:
    return request.query_params.get("split") or "train"


def build_data_routes(outputs: Outputs) -> list[Route]:
    """The routes of the Data page."""
    pages, root = DataPages(outputs), "/api/runs/{experiment}/{run}/data"
    return [
        Route(root, pages.send_summary),
        Route(f"{root}/rows", pages.send_rows),
        Route(f"{root}/rows/{{index:int}}", pages.send_row),
    ]
