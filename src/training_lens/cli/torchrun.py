"""Starts a command once for each process, under torchrun's elastic agent."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from training_lens.config.distributed_section import DistributedSection
from training_lens.utils.logging import plain_console


def run_on_processes(section: DistributedSection, arguments: Sequence[str]) -> int:
    """Run `training-lens` with these arguments once for each process of this host; gives the exit code.

    The agent ends all processes when one is lost, and starts them anew as often as the section says.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Or what starts anew finds the addresses of the processes before it (pytorch issue 167288).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what starts and ends is said by our processes, or below
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // section.processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=section.processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=section.restarts,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "training_lens", *arguments)
    except ChildFailedError as error:
        return _explain_failure(error, section)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _explain_failure(error: Any, section: DistributedSection) -> int:
    """Say which process was killed; one that ended by itself has said why. Gives the exit code."""
    killed = {rank: failure for rank, failure in error.failures.items() if failure.exitcode < 0}
    if not killed:
        return int(error.get_first_failure()[1].exitcode)
    rank, failure = min(killed.items(), key=lambda item: item[1].timestamp)
    name = signal.Signals(-failure.exitcode).name
    plain_console(stderr=True).print(
        f"process {rank} of {section.processes} was killed ({name}), and the others ended with it. The system kills "
        "processes when memory runs out. training-lens train --resume RUN goes on from the newest checkpoint; "
        "distributed.restarts=N does so by itself.",
        style="red",
        soft_wrap=True,
    )
    return 1
