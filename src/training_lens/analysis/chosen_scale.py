"""The chosen scale of a run: `artifacts/scaled`, the adapter with its update multiplied, which answers from then on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from training_lens.errors import ConfigurationError
from training_lens.inference.session import open_run
from training_lens.models.adapter_files import CONFIG
from training_lens.models.adapter_scale import scale_adapter
from training_lens.models.adapters import save_adapter
from training_lens.runs.run_folder import SCALE_RECORD, RunFolder
from training_lens.utils.files import atomic_folder, hash_file, list_files
from training_lens.utils.integrity import write_sealed


def choose_scale(
    run: RunFolder, scale: float, device: str | None = None, given: Mapping[str, Any] | None = None
) -> None:
    """Let the run answer with its update times `scale`; 1 takes an earlier choice back. `artifacts/adapter` stays.

    The scaled adapter is one of the same kind and size, which every program can load, and appears whole or not at all.

    Args:
        device: as `model.device`, None: the run's; `given`: see `open_run`.

    Raises:
        ConfigurationError: 0, which is the base alone, or not a positive number.
        CheckpointError, AdapterError: the run is not finished, or its adapter cannot be loaded or scaled.
    """
    if not 0 < scale < float("inf"):
        raise ConfigurationError(
            f"--choose {scale:g}: give a number above 0. The base alone answers with inference.adapter=none."
        )
    if scale == 1:
        if run.scaled.is_dir():
            shutil.rmtree(run.scaled)
        return
    run.require_adapter()
    session = open_run(run, device, given=given, adapter=run.adapter)
    scale_adapter(session.model, scale)
    with atomic_folder(run.scaled, existing="replace") as building:
        adapter = building / "adapter"
        adapter.mkdir()
        save_adapter(session.model, adapter)
        shutil.copyfile(run.adapter / CONFIG, adapter / CONFIG)  # the same in all but the values of the weights
        hashes = {path.relative_to(building).as_posix(): hash_file(path) for path in list_files(adapter)}
        write_sealed(building / SCALE_RECORD, {"scale": scale, "files": hashes}, verbatim=True)
