"""A run and its integrations: the light ones in threads beside the loop, the others in the courier's process.

The loop knows nothing of them: they read what the run writes to its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from training_lens.integrations.configured import asked_for
from training_lens.integrations.courier import Courier
from training_lens.integrations.delivery import Integration, IntegrationManager
from training_lens.integrations.record import RunRecord
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
Build = Callable[[RunRecord], Integration]


@contextmanager
def tracked(run: RunFolder, own: Sequence[Build] = ()) -> Iterator[None]:
    """Within the block the run is sent to where its config says; at its end, what is not sent yet.

    Args:
        run: with its config and summary written; by the end of the block its status must be told there.
        own: integrations of the user's, in Python: each is built for the run, and lives in a thread of this process.
    """
    record = RunRecord(run)
    asked = asked_for(record.config)
    near = [item.of(record) for item in asked if item.integration.in_process] + [build(record) for build in own]
    tracking = record.config.tracking
    manager = IntegrationManager(near, run.tracking, tracking.send_seconds)
    courier = Courier(run, tracking.wait_seconds) if len(asked) > len(near) - len(own) else None
    if courier:
        courier.start()
    manager.start()
    try:
        yield
    finally:
        manager.finish(tracking.wait_seconds)  # first: the courier's mirror sends what they wrote, too
        if courier:
            logger.debug("sending what is not sent yet, for at most %g s", tracking.wait_seconds)
            courier.finish()
