"""Cheap checks before torch is imported: missing files, folders and models are reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from training_lens.errors import ConfigurationError
from training_lens.utils.names import expand_home

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig


def check_training(settings: TrainingConfig) -> None:
    """Refuse a run that cannot start, as the run would later: check its folder, rows, base and initial adapter."""
    output = settings.output
    if output.run_id:
        from training_lens.runs.run_folder import RunFolder, runs_folder

        RunFolder(runs_folder(output.base_output_dir, output.experiment_name) / output.run_id).require_new()
    check_rows(settings)
    check_base(settings)
    start_unsloth(settings)
    if settings.peft.from_adapter is not None:
        from training_lens.models.adapter_files import adapter_folder

        adapter_folder(settings.peft.from_adapter)


def start_unsloth(settings: TrainingConfig) -> None:
    """Import unsloth, before transformers, for a run that asks for it; refuse one that it cannot train here."""
    if settings.model.backend == "unsloth":
        from training_lens.models.unsloth_backend import start_backend
        from training_lens.utils.devices import get_device

        start_backend(settings, get_device(settings.model.device))


def check_rows(settings: TrainingConfig) -> None:
    """Refuse missing files of rows; what data sets on a hub or saved on disk hold is checked later."""
    for key in ("train", "validation"):
        specs = getattr(settings.data, key) or []
        check_files([spec for spec in specs if isinstance(spec, str)], f"data.{key}")


def check_files(specs: list[str], key: str) -> None:
    """Refuse missing paths, as `data.sources.expand_sources` does, and names that no hub has."""
    from training_lens.data.sources import HUB, expand_sources, is_saved_dataset, parse_hub_spec

    for spec in specs:
        if spec.startswith(HUB):
            parse_hub_spec(spec, key)
        elif not is_saved_dataset(Path(spec)) and not is_saved_dataset(Path(spec.rpartition(":")[0] or spec)):
            expand_sources([spec], key)


def check_base(settings: TrainingConfig) -> None:
    """Refuse a missing base model, and a template file that cannot be read."""
    from training_lens.models.location import locate_model

    locate_model(settings.model)
    template = settings.data.template
    if template.endswith((".jinja", ".jinja2", ".j2")):
        try:
            expand_home(template).open("rb").close()
        except OSError as error:
            raise ConfigurationError(f"data.template: '{template}' cannot be read ({error.strerror}).") from error


def check_own_model(settings: TrainingConfig) -> None:
    """Refuse missing rows and, unless a run names its own, a missing base model."""
    from training_lens.runs.run_lookup import uses_own_model

    if uses_own_model(settings.inference.adapter):
        check_rows(settings)
        check_base(settings)
    else:
        check_files([spec for spec in settings.data.validation or [] if isinstance(spec, str)], "data.validation")
