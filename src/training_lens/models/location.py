"""Where a base model is: a local folder, or an id on a hub. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

from training_lens import embedded
from training_lens.config.schema import ModelSection
from training_lens.errors import ModelLoadingError
from training_lens.utils.formatting import suggest_path
from training_lens.utils.names import expand_home

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def locate_model(model: ModelSection) -> str:
    """The local folder of the model, or its hub id unchanged.

    Raises:
        ModelLoadingError: the path does not exist, or the folder lacks a configuration or safetensors weights.
    """
    name = embedded.resolve_name(model.id)
    path = expand_home(name)
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or (path.parent.is_dir() and "/" in name):
            raise ModelLoadingError(f"model.id: no folder '{name}'.{suggest_path(path)}")
        if not HUB_ID.fullmatch(name):
            raise ModelLoadingError(f"model.id: {name!r} is not a folder here, and cannot be a hub id (OWNER/NAME).")
        return name  # a hub id
    if not (path / "config.json").is_file():
        raise ModelLoadingError(f"model.id: '{name}' holds no config.json, so it is not a transformers model folder.")
    if not any((path / weights).is_file() for weights in WEIGHTS):
        unsafe = sorted(p.name for p in path.glob("*.bin"))
        found = f"only {', '.join(unsafe)}, which may run code when opened" if unsafe else "no weights"
        raise ModelLoadingError(
            f"model.id: '{name}' holds {found}; expected model.safetensors. Download the model whole, or convert it."
        )
    return str(path)


def local_folder(model: ModelSection) -> Path | None:
    """The local folder of the model's files; None if a hub's model is not in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    path = locate_model(model)
    if Path(path).is_dir():
        return Path(path)
    found = [try_to_load_from_cache(path, name, revision=model.revision) for name in WEIGHTS]
    return next((Path(file).parent for file in found if isinstance(file, str)), None)
