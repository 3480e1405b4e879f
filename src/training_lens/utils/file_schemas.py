"""The types of the values in JSON files: our metadata and manifests, and adapter_config.json.

Missing and unknown keys are allowed here; readers handle them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from training_lens.utils.expected_values import describe_expected

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Files = dict[str, str]
Contents = dict[str, dict[str, int | str]]
SCHEMAS: dict[str, dict[str, Any]] = {
    "adapter_config.json": {
        "alpha_pattern": dict[str, float] | None,
        "base_model_name_or_path": str | None,
        "lora_alpha": float | None,
        "modules_to_save": list[str] | None,
        "r": int | None,
        "rank_pattern": dict[str, int] | None,
        "target_modules": list[str] | str | None,
        "target_parameters": list[str] | None,
        "trainable_token_indices": list[int] | dict[str, list[int]] | None,
    },
    "base.json": {"files": Files, "id": str, "revision": str | None, "sha256": Files, "weights": str | None},
    "data.json": {
        "domains": list[str],
        "fingerprint": str,
        "global_batch_size": int,
        "processes": int,
        "tokens": Files,
        "train": dict[str, Any],
        "validation": dict[str, Any],
    },
    "files.json": {"files": list[str]},  # of a lens folder
    "hashes.json": {"files": Files},
    "lens.json": {
        "format": int,
        "modules": list[dict[str, Any]],
        "origin": str,
        "probe": dict[str, int] | None,
        "settings": dict[str, Any],
        "tables": dict[str, str],
    },
    "manifest.json": {  # of a checkpoint; of a prepared folder
        "data_fingerprint": str,
        "files": Files,
        "format": int,
        "splits": dict[str, dict[str, Any]],
        "step": int,
        "validation_loss": float | None,
    },
    "mirror.json": {
        "experiment": str,
        "files": Contents,
        "folder": str,
        "format": int,
        "host": str,
        "replacing": Contents,
        "run_id": str,
        "status": str,
        "updated": str,
        "version": str,
    },
    "study.db": {  # the attributes of a sweep's trial
        "block_nll": list[float],
        "continues": int,
        "default": dict[str, Any],
        "error": str,
        "host": str,
        "lock": str,
        "run_dir": str,
        "seconds": float,
        "token": str,
    },
    "summary.json": {
        "adapter_step": int,
        "base_validation_loss": float | None,
        "epochs": float,
        "run_dir": str,
        "seconds": float,
        "status": str,
        "steps": int,
        "train_loss": float | None,
        "validation_loss": float | None,
    },
}
LONGEST_SHOWN = 60  # characters of a value in a message


def find_type_error(name: str, values: Mapping[str, Any]) -> str:
    """A message about the first value of a wrong type in a file of this name; empty if there is none."""
    if name not in SCHEMAS:
        return ""
    from pydantic import ValidationError

    try:
        _type_adapter(name).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # List indices and members of unions, such as 'list[str]', are left out.
        names = (part for part in first["loc"] if isinstance(part, str))
        key = ".".join(name for name in names if name not in ("str", "int") and not name.endswith("]"))
        shown = repr(first["input"])
        expected = f", expected {words}" if (words := describe_expected(first)) else f". {first['msg']}"
        return f"{key}: given {shown[:LONGEST_SHOWN]}{'...' * (len(shown) > LONGEST_SHOWN)}{expected}"
    return ""


@lru_cache
def _type_adapter(name: str) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter, with_config
    from typing_extensions import TypedDict

    keys = TypedDict("keys", SCHEMAS[name], total=False)  # type: ignore[misc]
    return TypeAdapter(with_config(ConfigDict(extra="allow", strict=True))(keys))
