"""Several processes: how many are started, and whether each holds the whole base."""

from __future__ import annotations

from typing import Literal

from training_lens.config.section import Section, setting


class DistributedSection(Section):
    """Training on several processes, through torchrun's elastic agent."""

    processes: int = setting(
        1, "processes that `train` starts on this host, one for each GPU; under torchrun, torchrun's number holds", ge=1
    )
    base: Literal["replicated", "sharded"] = setting(
        "replicated", "replicated: each process holds the whole base; sharded: a share of every layer (FSDP2)"
    )
    cpu_offload: bool = setting(False, "keep the shares of a sharded base in the host's memory between uses")
    restarts: int = setting(
        0, "times that `train` starts its processes anew after one is lost; they resume the newest checkpoint", ge=0
    )
    timeout_seconds: float = setting(
        1800.0, "how long a process waits for the others before it takes them for lost", gt=0
    )

    def describe_alone(self) -> list[str]:
        """A line for each setting that means nothing to a process that was started alone."""
        several = f"distributed.processes={self.processes}: here is one process; training-lens train starts as many"
        sharded = "distributed.base=sharded: one process holds the whole base"
        return [several] * (self.processes > 1) + [sharded] * (self.base == "sharded")
