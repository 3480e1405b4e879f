"""What `explain` found of a run, for its page: a few sentences, and a picture or a table, from the JSON of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from training_lens.errors import CheckpointError
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.integrity import read_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
TITLES: Mapping[str, str] = {
    "modules": "Which modules carry the gain",
    "rows": "How each training row was learned",
    "answer": "Why one answer changed",
    "memory": "What it remembers of its rows",
}
SHOWN_ROWS = 6  # of a table
MOST_LAYERS = 100  # of a grid
MOST_TOKENS = 400  # of an answer
LONGEST_TEXT = 400  # characters of a cell, or of an answer
Values = Mapping[str, Any]


@dataclass(frozen=True)
class ExplanationTable:
    """Rows of text under column names; numbers stand in `numbers`, the positions of columns that align right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class ExplanationGrid:
    """A number for each row and column, None where there is none; shaded by its size."""

    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    kind: Literal["grid"] = "grid"


@dataclass(frozen=True)
class ExplanationTokens:
    """The tokens of an answer as (text, number), shaded by the number; `marked` is the position of a framed one."""

    caption: str
    tokens: Sequence[tuple[str, float]]
    marked: int
    kind: Literal["tokens"] = "tokens"


@dataclass(frozen=True)
class ExplanationAnswers:
    """Texts side by side, as (name, text)."""

    answers: Sequence[tuple[str, str]]
    kind: Literal["answers"] = "answers"


ExplanationPart = ExplanationTable | ExplanationGrid | ExplanationTokens | ExplanationAnswers


def describe_explanations(run: RunFolder) -> list[dict[str, Any]]:
    """Each kind of explanation: what it answers, and if it was computed its sentences, parts and page.

    `page` is the file of the whole explanation in the run's folder, None where it was not computed.
    """
    return [_describe_explanation(run, name, title) for name, title in TITLES.items()]


def _describe_explanation(run: RunFolder, name: str, title: str) -> dict[str, Any]:
    page, record = (run.reports / f"explain-{name}.{ending}" for ending in ("html", "json"))
    found: dict[str, Any] = {"sentences": [], "parts": []}
    if record.is_file():
        found = _read_explanation(name, record, record.stat().st_mtime_ns)
    has_page = page.is_file()
    return {"name": name, "title": title, "page": f"reports/{page.name}" if has_page else None, **found}


@lru_cache(maxsize=64)
def _read_explanation(name: str, record: Path, written: int) -> dict[str, Any]:
    """The sentences and parts of a file as it was written then; none where it cannot be read."""
    try:
        values = read_sealed(record)
        sentences = [str(sentence) for sentence in values.get("sentences") or ()]
        return {"sentences": sentences, "parts": [asdict(part) for part in BUILDERS[name](values)]}
    except (CheckpointError, OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        logger.debug("%s is not shown: %s", record, error)
        return {"sentences": [], "parts": []}


def _build_modules(values: Values) -> Iterator[ExplanationPart]:
    """The share of each layer and module type in the change of the loss."""
    if not values["is_complete"]:
        return
    layers = [str(group["name"]) for group in values["by_layer"]][:MOST_LAYERS]
    kinds = list(dict.fromkeys(str(module["kind"]) for module in values["modules"]))
    shares = np.full((len(layers), len(kinds)), np.nan)
    outside = next((name for name in layers if not name.isdigit()), "")  # embeddings and the output layer
    for module in values["modules"]:
        layer = outside if module["layer"] is None else str(module["layer"])
        if layer in layers and module["fraction"] is not None:
            place = layers.index(layer), kinds.index(str(module["kind"]))
            shares[place] = np.nan_to_num(shares[place]) + 100 * float(module["fraction"])
    names = [f"layer {name}" if name.isdigit() else name for name in layers]
    rows = [[None if np.isnan(value) else round(value, 1) for value in row] for row in shares.tolist()]
    yield ExplanationGrid("Share of the change of the loss, in %, by layer and module type", names, kinds, rows)


def _build_rows(values: Values) -> Iterator[ExplanationPart]:
    """How many rows each list has, and the first likely mislabelled ones with the reason."""
    lists = {str(name): list(rows) for name, rows in values["lists"].items()}
    yield ExplanationTable(
        "Lists of rows", ("list", "rows"), [(name, f"{len(rows):,}") for name, rows in lists.items()], numbers=(1,)
    )
    name, rows = next(((name, rows) for name, rows in lists.items() if rows), ("", []))
    if rows:
        cells = [(_name_row(row["id"]), _cut(row["reason"])) for row in rows[:SHOWN_ROWS]]
        yield ExplanationTable(f"The first that are {name}", ("row", "why"), cells)


def _build_answer(values: Values) -> Iterator[ExplanationPart]:
    """What each model says, and the tokens of the answer that was explained."""
    own = [("Base", values["base_answer"]), ("Adapter", values["adapter_answer"])] if values["prompt"] else []
    asked = [("Prompt", values["prompt"]), *own]
    given = [("Explained", values["answer"])] if values["source"] != "greedy" else []
    yield ExplanationAnswers([(name, _cut(text)) for name, text in (*asked, *given) if text])
    tokens = [(_cut(token["text"]), float(token["change"])) for token in values["tokens"][:MOST_TOKENS]]
    caption = "How the adapter changed the log-probability of each token, in nats"
    yield ExplanationTokens(caption, tokens, int(values["token"]))
    ranking = (values.get("rows") or {}).get("ranking") or ()
    if ranking:
        cells = [(_name_row(row["id"]), _cut(row["prompt"]), _cut(row["answer"])) for row in ranking[:SHOWN_ROWS]]
        yield ExplanationTable("The training rows of the highest scores", ("row", "prompt", "answer"), cells)


def _build_memory(values: Values) -> Iterator[ExplanationPart]:
    """The rows of the highest exposure, and those that were continued the furthest."""
    exposures = sorted(values["exposures"], key=lambda row: -float(row["exposure"]))[:SHOWN_ROWS]
    if exposures:
        cells = [(_name_row(row["id"]), f"{row['exposure']:.2f}", _cut(row["answer"])) for row in exposures]
        yield ExplanationTable("The highest exposures, in bits", ("row", "exposure", "answer"), cells, numbers=(1,))
    longest = sorted(values["continuations"], key=lambda row: -int(row["longest"]))[:SHOWN_ROWS]
    if longest:
        continued = [_describe_continuation(row) for row in longest]
        columns = ("row", "rows", "adapter", "base", "tokens", "continued exactly")
        yield ExplanationTable("The longest exact continuations, in tokens", columns, continued, numbers=(2, 3, 4))


def _describe_continuation(row: Values) -> tuple[str, ...]:
    numbers = (f"{int(row[name])}" for name in ("longest", "base", "tokens"))
    return _name_row(row["id"]), str(row["group"]), *numbers, _cut(row["text"])


def _name_row(row_id: Any) -> str:
    """A row's id with the file's name alone."""
    return str(row_id).replace("\\", "/").rpartition("/")[2]


def _cut(text: Any) -> str:
    words = str(text)
    return words if len(words) <= LONGEST_TEXT else f"{words[:LONGEST_TEXT]}…"


BUILDERS: Mapping[str, Callable[[Values], Iterator[ExplanationPart]]] = {
    "modules": _build_modules,
    "rows": _build_rows,
    "answer": _build_answer,
    "memory": _build_memory,
}
