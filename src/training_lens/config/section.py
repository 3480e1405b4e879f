"""What the sections of the schema share: strictness, and types of their values."""

from __future__ import annotations

import datetime
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from training_lens.config.keys import find_problems, known_keys, list_problems
from training_lens.errors import ConfigurationError
from training_lens.utils.arrow_rows import iterate_arrow_rows
from training_lens.utils.names import check_experiment, check_run_id, expand_home

Default = TypeVar("Default")
NOTHING = ("NAType", "NaTType")  # pandas' own words for a missing value


def rows_of_table(value: Any) -> list[dict[str, Any]] | None:
    """The rows of a table, of plain JSON values; None where the value is no table that is known.

    A missing value (NaN, NaT, NA) is null. An index of a frame that has a name is a field; one without is set aside.
    No library is imported: who gives a table has it already.

    Raises:
        ValueError: several splits, a stream, or columns of one name.
    """
    names = {kind.__name__ for kind in type(value).__mro__}
    if names & {"DatasetDict", "IterableDatasetDict"}:
        raise ValueError(
            f"the data set has splits ({', '.join(value)}); give one of them, such as ['{next(iter(value))}']"
        )
    if "IterableDataset" in names:
        raise ValueError("the data set is a stream of unknown length; give a list of its rows, or save it to files")
    module = type(value).__module__.split(".")[0]
    read = _READERS.get((module, type(value).__name__))
    return None if read is None else [_convert_row(row) for row in read(value)]


def _frame_rows(frame: Any) -> Iterable[Mapping[Any, Any]]:
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    if not frame.columns.is_unique:
        raise ValueError("the DataFrame has several columns of one name; rename or drop them")
    rows: Iterable[Mapping[Any, Any]] = frame.to_dict("records")
    return rows


_READERS: dict[tuple[str, str], Callable[[Any], Iterable[Mapping[Any, Any]]]] = {
    ("pandas", "DataFrame"): _frame_rows,
    ("datasets", "Dataset"): lambda dataset: iterate_arrow_rows(dataset.with_format("arrow").iter(1000)),
    ("pyarrow", "Table"): lambda table: iterate_arrow_rows([table]),
    ("polars", "DataFrame"): lambda frame: frame.to_dicts(),
}


def _convert_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _convert_value(value) for key, value in row.items()}


def _convert_value(value: Any) -> Any:
    """The value as JSON has it, where it has one: arrays are lists, dates their ISO text, missing values null."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    if type(value).__name__ in NOTHING:
        return None
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    if isinstance(value, Mapping):
        return _convert_row(value)
    if isinstance(value, list | tuple):
        return [_convert_value(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    return _convert_value(value.tolist()) if type(value).__module__ == "numpy" else value


def setting(default: Default, description: str, **limits: Any) -> Default:
    """A key of a section: its default, what the docs say of it, and pydantic's limits and options."""
    return Field(default, description=description, **limits)  # type: ignore[no-any-return]


def as_list(value: Any) -> Any:
    """A single path as a list of one; `Path` objects as text."""
    values = [value] if isinstance(value, str | Path) else value
    return [str(v) if isinstance(v, Path) else v for v in values] if isinstance(values, list) else values


def as_rows(value: Any) -> Any:
    """As `as_list`; tables and single rows as a list of rows.

    Raises:
        ValueError: columns, or a list of rows that holds something else.
    """
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        _require_rows(value)
    if isinstance(value, list) and value and not isinstance(value[0], str | Path | dict):
        tables = [rows_of_table(item) for item in value]
        return value if None in tables else [row for rows in tables for row in rows or ()]
    rows = rows_of_table(value)
    if rows is not None or not isinstance(value, dict):
        return as_list(value) if rows is None else rows
    are_lists = all(isinstance(column, list) for column in value.values())
    if len(value) > 1 and are_lists and not any(isinstance(cell, dict) for column in value.values() for cell in column):
        raise ValueError("these are columns; give a list of rows, or a pandas DataFrame of the columns")
    return [value]


def _require_rows(values: list[Any]) -> None:
    others = [(i, value) for i, value in enumerate(values, 1) if not isinstance(value, dict)]
    if others:
        number, value = others[0]
        more = f" (and {len(others) - 1:,} more)" if others[1:] else ""
        raise ValueError(
            f"item {number:,} of {len(values):,} is {value!r:.100}{more}, where others are rows; give rows alone, "
            "or paths alone"
        )


def expand_path_text(value: str) -> str:
    """A path with its '~' expanded; other text as it is."""
    return str(expand_home(value)) if value.startswith("~") else value


# Characters; rows, which have checks of their own.
NO_NAMES = ("delimiter", "quotechar", "escapechar", "train", "validation")
PATH_MARKER = AfterValidator(expand_path_text)  # also marks a key as a path

RunId = Annotated[str, AfterValidator(check_run_id)]
ExperimentName = Annotated[str, AfterValidator(check_experiment)]
Place = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value), PATH_MARKER]
Paths = Annotated[list[Place], BeforeValidator(as_list)]
Count = Annotated[int, Field(ge=1)]
Names = Annotated[list[str], BeforeValidator(as_list)]
Rows = Annotated[list[Place] | list[dict[str, Any]], BeforeValidator(as_rows)]


class Section(BaseModel):
    """A section of the config: unknown keys are errors, and assignments are validated.

    Raises:
        ConfigurationError: on creation, validation or assignment; lists every problem. A refused assignment changes
            nothing.
    """

    __slots__ = ("_root",)  # the config that contains it, and its prefix there; not part of its value

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_blank(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse blank text."""
        texts = value if isinstance(value, list) else [value]
        blank = [text for text in texts if isinstance(text, str) and not text.strip()]
        if blank and info.field_name not in NO_NAMES:
            raise ValueError(f"given {blank[0]!r}, which names nothing; give a value, or leave the key out")
        return value

    def __init__(self, /, **values: Any) -> None:
        with _convert_errors(type(self), values):
            super().__init__(**values)

    # Marks this as equivalent to pydantic's own, so that nested sections are validated together.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        with _convert_errors(cls, obj):
            return super().model_validate(obj, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        values, given = self.__dict__.copy(), self.__pydantic_fields_set__.copy()
        root, prefix = self._find_root()
        try:
            super().__setattr__(name, value)
            problems = root.find_conflicts()
        except ValidationError as error:  # checks across a section's keys come after the assignment
            problems = list_problems(error, known_keys(type(root)), prefix)
        if problems:
            object.__setattr__(self, "__dict__", values)
            object.__setattr__(self, "__pydantic_fields_set__", given)
            raise ConfigurationError(problems)
        self._adopt_sections(root, prefix)

    def model_post_init(self, context: Any, /) -> None:
        self._adopt_sections(self, "")

    def find_conflicts(self) -> list[str]:
        """A line for each conflict between keys of several sections."""
        return []

    def explicit_values(self) -> dict[str, Any]:
        """The keys that were set, by section, without defaults."""
        values: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                values[name] = value.explicit_values()
            elif name in self.model_fields_set:
                values[name] = value
        return values

    def _find_root(self) -> tuple[Section, str]:
        """The config that contains this section, and the prefix of its keys there: 'data.fields.'."""
        reference, prefix = getattr(self, "_root", (None, ""))
        root = reference() if reference else None
        return (self, "") if root is None else (root, prefix)

    def _adopt_sections(self, root: Section, prefix: str) -> None:
        """Link the subsections to the root; a section of another config is copied."""
        for name in type(self).model_fields:
            section = self.__dict__[name]
            if not isinstance(section, Section):
                continue
            owner, _ = section._find_root()
            if not any(owner is known for known in (section, self, root)):
                section = self.__dict__[name] = section.model_copy()
            object.__setattr__(section, "_root", (weakref.ref(root), f"{prefix}{name}."))
            section._adopt_sections(root, f"{prefix}{name}.")


@contextmanager
def _convert_errors(model: type[Section], values: Any) -> Iterator[None]:
    """Within the block, pydantic's errors on `values` become one ConfigurationError."""
    try:
        yield
    except ValidationError as error:
        raise ConfigurationError(find_problems(model, values, error)) from None
