"""Random state: seeded, saved as tensors, restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_everything(seed: int) -> None:
    """Seed torch on every device. Training uses neither `random` nor NumPy's global state."""
    torch.manual_seed(seed)


def rng_state() -> dict[str, torch.Tensor]:
    """The random state of the CPU and of every CUDA device, as uint8 tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore a state from `rng_state`; devices that do not exist here are skipped."""
    torch.set_rng_state(state["cpu"])
    for name, tensor in state.items():
        if name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor, int(name[5:]))


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the random state at the end of the block."""
    state = rng_state()
    try:
        yield
    finally:
        restore_rng_state(state)
