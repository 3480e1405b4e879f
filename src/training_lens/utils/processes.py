"""The processes of a distributed run: rank, reductions, barriers. torchrun or `accelerate launch` starts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from training_lens.errors import ProcessLostError
from training_lens.utils.formatting import describe_error
from training_lens.utils.launch import launched_count

T = TypeVar("T")
OF_COLLECTIVES = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "ProcessGroup")


class Processes:
    """This process's place among those of its run; a single process without torchrun.

    Args:
        device: where this process computes, if there is only one.
        is_base_sharded: each process holds a share of the base, so that all of them run every pass together.
        timeout_seconds: how long one waits for the others; None: torch's own limit.
    """

    def __init__(
        self, device: torch.device, is_base_sharded: bool = False, timeout_seconds: float | None = None
    ) -> None:
        from accelerate import PartialState

        limit = {"timeout": timedelta(seconds=timeout_seconds)} if launched_count() > 1 and timeout_seconds else {}
        self._state = PartialState(cpu=device.type == "cpu", **limit)
        self.index: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.device = torch.device(self._state.device) if self.count > 1 and device.type != "cpu" else device
        self.is_base_sharded = is_base_sharded and self.count > 1

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, on every process. A sync point if there are several."""
        if self.count == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def reduce_min(self, value: int) -> int:
        """The minimum over all processes, on every process. A sync point if there are several."""
        return min(self.gather(value))

    def gather(self, value: T) -> list[T]:
        """The values of all processes in order, on every process. A sync point if there are several."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_main(self, value: T) -> T:
        """The main process's value, on every process."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def wait_for_all(self) -> None:
        """A barrier: wait until every process gets here."""
        self._state.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """The main process runs the block first, so that the others find its caches."""
        return self._state.main_process_first()  # type: ignore[no-any-return]

    @contextmanager
    def take_turns(self) -> Iterator[None]:
        """In the block, one process of each host at a time: what they load needs the host's memory once."""
        own: int = self._state.local_process_index
        last = max(self.gather(own))
        for _ in range(own):
            self.wait_for_all()
        yield
        for _ in range(last - own):
            self.wait_for_all()

    @contextmanager
    def explain_lost_process(self, advice: str) -> Iterator[None]:
        """In the block, an error of a collective is a `ProcessLostError`: another process ended or is out of reach.

        Args:
            advice: what the error says at its end.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count > 1 and any(sign in str(error) for sign in OF_COLLECTIVES):
                reason = describe_error(error).partition(". This is typically")[0]  # gloo's guesses follow
                raise ProcessLostError(
                    f"process {self.index} of {self.count}: another process of the run ended or cannot be reached, so "
                    f"this one ends, too ({reason}). {advice}"
                ) from error
            raise
