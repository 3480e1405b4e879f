"""Rows of Arrow tables (Parquet files, `datasets`) as plain values, as JSON would hold them.

An Arrow column has one type for all rows. So a struct has every field that occurs in any row, and is null where a row
lacks it: a tool call would get the arguments of all other tools. These nulls are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from training_lens.utils.limits import NESTED, NESTING, TooMuchError

Clean = Callable[[Any], Any]


def iterate_arrow_rows(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The values of each row of `pyarrow.RecordBatch`es or tables of one schema, without the nulls of structs.

    In a struct, null and a missing field look the same: both become a missing field. Nulls are kept in columns, lists
    and maps, and in the `content` of a struct with a `role`, since a message may be empty.
    """
    cleaners: dict[str, Clean] | None = None
    for batch in batches:
        if cleaners is None:
            level = [field.type for field in batch.schema]  # too deep, it would end recursive functions, pyarrow's too
            for _ in range(NESTING + 1):
                level = [kind.field(i).type for kind in level for i in range(kind.num_fields)]
            if level:
                raise TooMuchError(NESTED)
            cleaners = {field.name: clean for field in batch.schema if (clean := _make_cleaner(field.type)) is not None}
        for values in batch.to_pylist(maps_as_pydicts="strict"):
            for name, clean in cleaners.items():
                values[name] = clean(values[name])
            yield values


def _make_cleaner(kind: Any) -> Clean | None:
    """A function that removes nulls from structs in values of an Arrow type; None if the type has no structs."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return _make_struct_cleaner({field.name: _make_cleaner(field.type) for field in kind})
    is_map, is_list = types.is_map(kind), types.is_list(kind) or types.is_large_list(kind)
    is_list = is_list or types.is_fixed_size_list(kind) or types.is_list_view(kind)
    inner = kind.item_type if is_map else kind.value_type if is_list else None
    clean = None if inner is None else _make_cleaner(inner)
    if clean is None:
        return None
    if is_map:
        return lambda value: value and {key: clean(item) for key, item in value.items()}
    return lambda value: value and [clean(item) for item in value]


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
