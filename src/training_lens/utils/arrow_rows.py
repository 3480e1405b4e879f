"""Rows of Arrow tables (Parquet files, data sets of `datasets`) as JSON would have them.

A column of Arrow has one type for all rows. A struct therefore has every field that any row has, and the rows that lack
one hold null there: a call of one function gets the arguments of all others. These nulls are taken out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from training_lens.utils.limits import NESTED, NESTING, TooMuchError

Clean = Callable[[Any], Any]


def iterate_arrow_rows(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The values of each row, without the nulls that Arrow put into structs.

    Within a struct, null and a missing field cannot be told apart: both become a missing field. Columns keep their
    nulls, lists and maps keep theirs, and the `content` of a struct with a `role` does: a message may say nothing.

    Args:
        batches: `pyarrow.RecordBatch`es or tables of one schema.
    """
    cleaners: dict[str, Clean] | None = None
    for batch in batches:
        if cleaners is None:
            _check_nesting(batch.schema)
            cleaners = {field.name: clean for field in batch.schema if (clean := _make_cleaner(field.type)) is not None}
        for values in batch.to_pylist(maps_as_pydicts="strict"):
            for name, clean in cleaners.items():
                values[name] = clean(values[name])
            yield values


def _check_nesting(schema: Any) -> None:
    """Refuse types nested so deep that no recursive function gets through, such as those of pyarrow's own values."""
    level = [field.type for field in schema]
    for _ in range(NESTING + 1):
        level = [kind.field(i).type for kind in level for i in range(kind.num_fields)]
    if level:
        raise TooMuchError(NESTED)


def _make_cleaner(kind: Any) -> Clean | None:
    """What takes nulls out of the structs in values of an Arrow type; None where there are no structs."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return _make_struct_cleaner({field.name: _make_cleaner(field.type) for field in kind})
    if types.is_map(kind):
        return _make_map_cleaner(_make_cleaner(kind.item_type))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_list_view(kind):
        return _make_list_cleaner(_make_cleaner(kind.value_type))
    return None


def _make_map_cleaner(clean: Clean | None) -> Clean | None:
    return clean and (lambda value: value and {key: clean(item) for key, item in value.items()})


def _make_list_cleaner(clean: Clean | None) -> Clean | None:
    return clean and (lambda value: value and [clean(item) for item in value])


def _make_struct_cleaner(fields: dict[str, Clean | None]) -> Clean:
    nested = {name: clean for name, clean in fields.items() if clean is not None}
    is_message = {"role", "content"} <= fields.keys()

    def clean(value: Any) -> Any:
        if value is None:
            return None
        found = value
        if None in value.values():
            found = {n: item for n, item in value.items() if item is not None or (is_message and n == "content")}
        for name, clean_field in nested.items():
            if name in found:
                found[name] = clean_field(found[name])
        return found

    return clean
