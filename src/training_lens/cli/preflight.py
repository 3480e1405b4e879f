"""Cheap checks before torch is imported: files, folders and models that are not there are said at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig


def check_training(settings: TrainingConfig) -> None:
    """Refuse a run that cannot begin: its rows, its base, its adapter to go on from, or its place.

    Raises:
        TrainingLensError: as the run itself would say it later.
    """
    from training_lens.runs.run_folder import RunFolder, runs_folder

    output = settings.output
    if output.run_id:
        RunFolder(runs_folder(output.base_output_dir, output.experiment_name) / output.run_id).require_new()
    check_rows(settings)
    check_base(settings)
    if settings.peft.from_adapter is not None:
        from training_lens.models.adapter_files import adapter_folder

        adapter_folder(settings.peft.from_adapter)


def check_rows(settings: TrainingConfig) -> None:
    """Refuse files of rows that are not there; what a hub or a saved data set holds is looked at later.

    Raises:
        DatasetError: a path that is not there, or a glob that matches nothing.
    """
    for key in ("train", "validation"):
        specs = getattr(settings.data, key) or []
        check_files([spec for spec in specs if isinstance(spec, str)], f"data.{key}")


def check_files(specs: list[str], key: str) -> None:
    """Refuse paths that are not there, as `data.sources.expand_sources` does.

    Raises:
        DatasetError: names the key, and a near file.
    """
    from training_lens.data.sources import HUB, expand_sources

    local = [spec for spec in specs if not spec.startswith(HUB) and not Path(spec.rpartition(":")[0] or spec).is_dir()]
    expand_sources(local, key)


def check_base(settings: TrainingConfig) -> None:
    """Refuse a base model that is not there, and a template file that cannot be read.

    Raises:
        ModelLoadingError: a path that is not there, or a folder that is no model's.
        ConfigurationError: the template's file cannot be read.
    """
    from training_lens.errors import ConfigurationError
    from training_lens.models.location import locate
    from training_lens.utils.names import expand_home

    locate(settings.model)
    template = settings.data.template
    if template.endswith((".jinja", ".jinja2", ".j2")):
        try:
            expand_home(template).open("rb").close()
        except OSError as error:
            raise ConfigurationError(f"data.template: '{template}' cannot be read ({error.strerror}).") from error


def check_own_model(settings: TrainingConfig) -> None:
    """Refuse rows and, where no run brings its own, a base model that are not there.

    Raises:
        TrainingLensError: as `check_rows` and `check_base`.
    """
    from training_lens.runs.run_lookup import uses_own_model

    if uses_own_model(settings.inference.adapter):
        check_rows(settings)
        check_base(settings)
    else:
        check_files([spec for spec in settings.data.validation or [] if isinstance(spec, str)], "data.validation")
