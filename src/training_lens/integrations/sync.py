"""Sending what of a run is not sent yet, when its process is long gone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from training_lens.config.run_config import SYNC_KEYS, require_consent
from training_lens.errors import IntegrationError
from training_lens.integrations.configured import asked_for
from training_lens.integrations.courier import QUIET
from training_lens.integrations.delivery import Integration, IntegrationManager, IntegrationState
from training_lens.integrations.record import RunRecord
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import describe_error

LONGEST = 24 * 3600.0  # seconds: a person watches, and Ctrl-C ends it


def send(
    folder: RunFolder, changes: Mapping[str, dict[str, Any]] | None = None, *, again: bool = False
) -> tuple[IntegrationState, ...]:
    """Send the rest of a run to all that it is connected to.

    Args:
        changes: config keys by section that hold in place of the run's own; see `RunRecord`.
        again: send everything, also what was sent before: for a place that lost it.

    Raises:
        IntegrationError: the run is still training, and has its own sender.
        ConfigurationError: it names classes or places that the user has not allowed, see `run_config.require_consent`.
    """
    record, integrations = _connected(folder, changes)
    if record.status == "running":
        raise IntegrationError(
            f"the run {folder.run_id} is training ({folder.process_label}), and sends by itself. Wait until it ends."
        )
    for integration in integrations if again else ():
        integration.forget()
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    manager = IntegrationManager(integrations, folder.tracking)
    manager.start()
    return manager.finish(LONGEST)


def look(folder: RunFolder, changes: Mapping[str, dict[str, Any]] | None = None) -> tuple[IntegrationState, ...]:
    """How a run stands with all that it is connected to; sends nothing, asks nobody."""
    return tuple(_standing(integration) for integration in _connected(folder, changes)[1])


def _connected(folder: RunFolder, changes: Mapping[str, dict[str, Any]] | None) -> tuple[RunRecord, list[Integration]]:
    record = RunRecord(folder, changes)
    require_consent(folder.root, record.config, changes or {}, *SYNC_KEYS)
    return record, [asked.of(record) for asked in asked_for(record.config)]


def _standing(integration: Integration) -> IntegrationState:
    try:
        integration.require()
    except IntegrationError as error:
        return IntegrationState(integration.name, "unavailable", describe_error(error), integration.outstanding())
    rest = integration.outstanding()
    return IntegrationState(integration.name, "waiting" if rest else "delivered", outstanding=rest)
