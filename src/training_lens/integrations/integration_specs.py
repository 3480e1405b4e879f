"""The integrations of a run's config."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.integrations.delivery import Integration
from training_lens.integrations.record import RunRecord
from training_lens.utils.formatting import describe_error, strip_full_stop

INTEGRATIONS = {
    "output.mirror": "mirror.MirrorIntegration",
    "tracking.wandb": "wandb.WandBIntegration",
    "tracking.mlflow": "mlflow.MlflowIntegration",
    "tracking.trackio": "trackio.TrackioIntegration",
    "tracking.hub": "hub.HuggingFaceIntegration",
}


@dataclass(frozen=True)
class IntegrationSpec:
    """An integration of a config that is not built yet. Its module imports no optional package."""

    integration: type[Integration]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, run: RunRecord) -> Integration:
        """Build the integration for one run."""
        return self.integration(run, **self.options)  # type: ignore[call-arg]


def list_integrations(config: TrainingConfig) -> list[IntegrationSpec]:
    """The integrations of a config, whether they can work here or not.

    Raises:
        ConfigurationError: a custom tracker cannot be imported, or is not a tracker.
    """
    tracking = config.tracking
    wanted = [INTEGRATIONS[key] for key in config.destinations]
    if tracking.tensorboard:
        wanted = ["tensorboard.TensorBoardIntegration", *wanted]
    packaged = [IntegrationSpec(_import_class(f"training_lens.integrations.{place}")) for place in wanted]
    custom = [IntegrationSpec(_import_tracker(place), options) for place, options in tracking.custom.items()]
    names = [spec.integration.name for spec in (*packaged, *custom)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"tracking.custom: the name {', '.join(twice)} is taken; give your class another one.")
    return [*packaged, *custom]


def _import_class(place: str) -> Any:
    module, name = place.rsplit(".", 1)
    return getattr(import_module(module), name)


def _import_tracker(place: str) -> type[Integration]:
    """A user's class, from a module in the current folder or an installed package."""
    if "." not in place:
        raise ConfigurationError(
            f"tracking.custom: '{place}' is no class; give module.Class, such as my_module.MyTracker."
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = _import_class(place)
    except Exception as error:  # whatever the user's module raises
        raise ConfigurationError(
            f"tracking.custom: '{place}' cannot be imported ({strip_full_stop(describe_error(error))}). "
            "Give module.Class of a module in this folder, or of an installed package."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Integration)):
        raise ConfigurationError(
            f"tracking.custom: '{place}' is no Tracker; derive it from training_lens.integrations.Tracker."
        )
    return found
