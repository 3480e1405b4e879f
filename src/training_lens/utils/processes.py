"""The processes of a distributed run, through Accelerate: rank, reductions, barriers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


class Processes:
    """This process's place among those started by `torchrun` or `accelerate launch`; a single process without them."""

    def __init__(self, device: torch.device) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=device.type == "cpu")
        self.index: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.device = torch.device(self._state.device) if self.count > 1 else device

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, on every process. A sync point if there are several."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        total: torch.Tensor = reduce(tensor.to(self.device), reduction="sum")
        return total.to(tensor.device)

    def reduce_min(self, value: int) -> int:
        """The minimum over all processes, on every process. A sync point if there are several."""
        if self.count == 1:
            return value
        from accelerate.utils import gather_object

        return int(min(gather_object([value])))

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def wait_for_all(self) -> None:
        """A barrier: wait until every process gets here."""
        self._state.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """The main process runs the block first, so that the others find its caches."""
        return self._state.main_process_first()  # type: ignore[no-any-return]
