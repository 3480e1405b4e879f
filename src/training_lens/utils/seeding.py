"""Random state: set from one seed, captured to tensors and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_everything(seed: int) -> None:
    """Seed torch on every device. Nothing in training draws from `random` or NumPy's global state."""
    torch.manual_seed(seed)


def rng_state() -> dict[str, torch.Tensor]:
    """The random state of the CPU and of every CUDA device, as uint8 tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_state` gave; devices that are not here are passed over."""
    torch.set_rng_state(state["cpu"])
    for name, tensor in state.items():
        if name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor, int(name[5:]))


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """What the block draws leaves no trace: the random state is put back at its end."""
    state = rng_state()
    try:
        yield
    finally:
        restore_rng_state(state)
