"""What the sections of the schema share: strictness, and types of their values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from training_lens.config.keys import known_keys
from training_lens.config.problems import find_problems, list_problems
from training_lens.config.table_rows import rows_of_table
from training_lens.errors import ConfigurationError
from training_lens.utils.names import check_experiment, check_run_id, expand_home


def as_list(value: Any) -> Any:
    """A single path as a list of one; `Path` objects as text."""
    values = [value] if isinstance(value, str | Path) else value
    return [str(v) if isinstance(v, Path) else v for v in values] if isinstance(values, list) else values


def as_rows(value: Any) -> Any:
    """As `as_list`; tables and single rows as a list of rows."""
    if isinstance(value, list) and value and not isinstance(value[0], str | Path | dict):
        tables = [rows_of_table(item) for item in value]
        return value if None in tables else [row for rows in tables for row in rows or ()]
    rows = rows_of_table(value)
    if rows is not None or not isinstance(value, dict):
        return as_list(value) if rows is None else rows
    if len(value) > 1 and all(isinstance(item, list) and not _has_objects(item) for item in value.values()):
        raise ValueError("these are columns; give a list of rows, or a pandas DataFrame of the columns")
    return [value]


def _has_objects(values: list[Any]) -> bool:
    return any(isinstance(value, dict) for value in values)


def expand_path_text(value: str) -> str:
    """A path with its '~' expanded; other text as it is."""
    return str(expand_home(value)) if value.startswith("~") else value


def path_as_text(value: Any) -> Any:
    """A `Path` as text."""
    return str(value) if isinstance(value, Path) else value


NO_NAMES = (
    "delimiter",
    "quotechar",
    "escapechar",
    "train",
    "validation",
)  # characters; rows, which have checks of their own
PATH_MARKER = AfterValidator(expand_path_text)  # also marks a key as a path

RunId = Annotated[str, AfterValidator(check_run_id)]
ExperimentName = Annotated[str, AfterValidator(check_experiment)]
Place = Annotated[str, BeforeValidator(path_as_text), PATH_MARKER]
Paths = Annotated[list[Place], BeforeValidator(as_list)]
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
