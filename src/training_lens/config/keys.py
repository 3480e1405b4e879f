"""The schema's keys as dotted names, and which of them an unknown name most likely meant."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from training_lens.config.schema import TrainingConfig
from training_lens.utils.formatting import nearest


def known_keys(model: type[BaseModel] = TrainingConfig, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted: ['model.id', 'model.revision', ...]."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += known_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The known key that `key` most likely meant, also where its section was left out or wrong."""
    last = key.rsplit(".", 1)[-1]
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    if last in by_last:
        return by_last[last]
    whole = nearest(key, known)
    if whole:
        return whole
    close = nearest(last, by_last)
    return by_last[close] if close else None
