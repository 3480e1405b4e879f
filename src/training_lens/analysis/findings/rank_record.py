"""The losses of an adapter truncated to smaller ranks, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from training_lens.errors import DamagedFileError
from training_lens.utils.integrity import read_sealed, write_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
FILE = "rank_check.json"
TOLERANCE = 0.01  # of the adapter's gain over the base


@dataclass(frozen=True)
class RankLoss:
    """The validation loss with the best approximation of each dW of a smaller rank.

    `rank` applies to every module; None means each module's own energy rank. `delta` is the increase over the loss of
    the whole adapter, `low` to `high` its 95 % interval (paired bootstrap over rows), None with a single row.
    """

    rank: int | None
    loss: float
    delta: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class RankCheck:
    """The losses of a run's adapter at its own and at smaller ranks, in nats per supervised token.

    `ranks` has the rank of each module, and `energy_ranks` how many directions hold 90 % of |dW|_F^2. `loss_error` is
    the bootstrap standard error of `loss` over rows. `at_energy_ranks` truncates each module to its own energy rank,
    `at_fixed_ranks` all modules to one rank. `rank_pattern` has the largest energy rank over layers by module name, to
    use as `peft.rank_pattern`. `step` is the last step of the run.
    """

    step: int
    rows: int
    supervised_tokens: int
    base_loss: float
    loss: float
    loss_error: float | None
    ranks: Mapping[str, int]
    energy_ranks: Mapping[str, int]
    at_energy_ranks: RankLoss
    at_fixed_ranks: tuple[RankLoss, ...]
    rank_pattern: Mapping[str, int]

    @property
    def gain(self) -> float:
        """The adapter's gain over the base."""
        return self.base_loss - self.loss

    def is_unchanged(self, at: RankLoss) -> bool:
        """Whether the loss increase is, with 95 % confidence, below 1 % of the adapter's gain."""
        return at.high is not None and self.gain > 0 and at.high < TOLERANCE * self.gain

    @property
    def smallest_unchanged(self) -> int | None:
        """The smallest fixed rank that does not change the loss."""
        return min((at.rank for at in self.at_fixed_ranks if at.rank and self.is_unchanged(at)), default=None)

    def write(self, lens_folder: Path) -> Path:
        """Save it as `rank_check.json` beside the captures."""
        lens_folder.mkdir(parents=True, exist_ok=True)
        write_sealed(lens_folder / FILE, asdict(self))
        return lens_folder / FILE


def read_rank_check(folder: Path) -> RankCheck | None:
    """The rank check in a run folder or lens folder; None if there is none.

    An unreadable file is ignored with a warning.
    """
    path = next((p for p in (folder / FILE, folder / "lens" / FILE) if p.is_file()), None)
    if path is None:
        return None
    try:
        values = read_sealed(path)
        values["at_energy_ranks"] = RankLoss(**values["at_energy_ranks"])
        values["at_fixed_ranks"] = tuple(RankLoss(**at) for at in values["at_fixed_ranks"])
        return RankCheck(**values)
    except (OSError, DamagedFileError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%s) and is ignored; measure it again with --check-rank", path, error)
        return None
