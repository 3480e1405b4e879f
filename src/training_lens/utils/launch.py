"""What torchrun and `accelerate launch` tell a process by its environment; imports no torch."""

from __future__ import annotations

import os

NO_ID = "none"  # torchrun's id of a launch that was given none


def is_launched() -> bool:
    """Whether torchrun or `accelerate launch` started this process."""
    return "RANK" in os.environ


def launched_rank() -> int:
    """This process's number among those that were started together; 0 for one that was started alone."""
    return int(os.environ.get("RANK", "0"))


def launched_count() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_launch() -> str | None:
    """What all restarts of one torchrun have in common; None without torchrun."""
    import psutil

    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    if launch != NO_ID:
        return launch
    agent = psutil.Process().parent()
    return f"{agent.pid}-{agent.create_time():.0f}" if agent else None
