"""Sending a run after its training: what is not sent yet, and later evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from training_lens.config.run_config import SYNC_KEYS, require_consent
from training_lens.config.schema import DESTINATIONS
from training_lens.errors import ConfigurationError, IntegrationError
from training_lens.integrations.courier import quiet_clients
from training_lens.integrations.delivery import Integration, IntegrationManager, IntegrationState
from training_lens.integrations.integration_specs import list_integrations
from training_lens.integrations.record import RunRecord
from training_lens.integrations.tracker import Tracker
from training_lens.runs.journal import Journal
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
SIDES = {"base": "base", "adapter": "adapter", "delta": "change"}  # keys of a report -> their names in trackers
SPEEDS = ("first_token", "token", "latency")
LONGEST_WAIT = 30.0  # seconds that a command waits for a tracker; `sync` waits longer
LONGEST = 24 * 3600.0  # seconds: a person watches, and Ctrl-C ends it


def send_run(
    folder: RunFolder, changes: Mapping[str, dict[str, Any]] | None = None, *, again: bool = False
) -> tuple[IntegrationState, ...]:
    """Send the rest of a run to its destinations.

    Args:
        changes: config keys by section that replace the run's own; see `RunRecord`.
        again: send everything again, for a destination that lost it.

    Raises:
        IntegrationError: the run is still training and sends by itself.
        ConfigurationError: it names classes or places that the user has not allowed, see `run_config.require_consent`.
    """
    record, integrations = _open_integrations(folder, changes)
    if record.status == "running":
        raise IntegrationError(
            f"the run {folder.run_id} is training ({folder.process_label}), and sends by itself. Wait until it ends."
        )
    if again:
        for integration in integrations:
            integration.forget()
    quiet_clients()
    manager = IntegrationManager(integrations, folder.tracking)
    manager.start()
    return manager.finish(LONGEST)


def read_delivery_states(
    folder: RunFolder, changes: Mapping[str, dict[str, Any]] | None = None
) -> tuple[IntegrationState, ...]:
    """The delivery state of each destination of a run, without network."""
    states = []
    for integration in _open_integrations(folder, changes)[1]:
        rest = integration.outstanding()
        try:
            integration.require()
        except IntegrationError as error:
            states.append(IntegrationState(integration.name, "unavailable", describe_error(error), rest))
        else:
            states.append(IntegrationState(integration.name, "waiting" if rest else "delivered", outstanding=rest))
    return tuple(states)


def _open_integrations(
    folder: RunFolder, changes: Mapping[str, dict[str, Any]] | None
) -> tuple[RunRecord, list[Integration]]:
    record = RunRecord(folder, changes)
    require_consent(folder.root, record.config, changes or {}, *SYNC_KEYS)
    return record, [spec.build(record) for spec in list_integrations(record.config)]


def record_evaluation(run: RunFolder, name: str, report: Mapping[str, Any]) -> None:
    """Add a report to the run's journal of evaluations, logs/evaluations.jsonl.

    Its step is the run's last one, plus one for each earlier evaluation: trackers that identify values by their step
    keep every evaluation. `name` is the command's and `report` its JSON.
    """
    lines = read_metrics(run.evaluations_file) if run.evaluations_file.is_file() else []
    ended = int(run.read_metadata("summary.json").get("steps", 0))
    step = max([ended, *(line["step"] + 1 for line in lines)])
    run.logs.mkdir(exist_ok=True)
    journal = Journal(run.evaluations_file)
    journal.open(after=step if run.evaluations_file.is_file() else 0)
    verdict = report.get("verdict")
    scalars = benchmark_scalars(report) if "cells" in report else evaluation_scalars(report)
    journal.write({"kind": "evaluation", "step": step, "name": name, "scalars": scalars, "verdict": verdict})
    journal.close()


def evaluation_scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of each model and of their difference, such as 'adapter/loss' and 'change/loss'."""
    found = {f"{shown}/{key}": value for side, shown in SIDES.items() for key, value in report.get(side, {}).items()}
    found |= {f"{model}/answers_{key}": value for model, ends in report.get("endings", {}).items()
              for key, value in ends.items() if key in ("unended", "looping")}  # fmt: skip
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def benchmark_scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """The speeds of each measured cell, such as 'adapter/16x128/tokens_per_second'; medians in seconds."""
    found: dict[str, float] = {}
    for cell in report["cells"]:
        if speed := cell["speed"]:
            place = f"{cell['model']}/{cell['batch_size']}x{cell['prompt_length']}"
            found[f"{place}/tokens_per_second"] = float(speed["tokens_per_second"])
            found |= {f"{place}/{name}_seconds": float(speed[name]["p50"]) for name in SPEEDS}
    return found


def send_evaluations(run: RunFolder) -> tuple[IntegrationState, ...]:
    """Send new evaluations to the run's trackers, for at most half a minute; the rest is left to `sync`.

    Custom trackers are left to `sync`: a run's folder names their code, and only commands whose purpose is sending
    import it. So are the trackers of a run from another machine. A run that is training sends by itself.
    """
    record = RunRecord(run)
    if record.status == "running":
        return ()
    config = record.config.replace_keys(tracking={"custom": {}})
    specs = [spec for spec in list_integrations(config) if issubclass(spec.integration, Tracker)]
    try:
        require_consent(run.root, config, {}, *DESTINATIONS)
    except ConfigurationError:
        logger.info("to send the result to the trackers that this run names: training-lens sync %s", run.root)
        specs = [spec for spec in specs if spec.integration.in_process]  # they only write into the run's folder
    trackers = [spec.build(record) for spec in specs]
    if any(not tracker.in_process for tracker in trackers):  # a client will be imported, and reads the environment
        quiet_clients()
    manager = IntegrationManager(trackers, run.tracking)
    manager.start()
    states = manager.finish(min(LONGEST_WAIT, record.config.tracking.wait_seconds))
    if record.config.tracking.custom:
        logger.info("to send the result to your own trackers: training-lens sync %s", run.root)
    return states
