"""What truncating an adapter to smaller ranks does to its loss: the values, and the file that keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from training_lens.errors import DamagedFileError
from training_lens.utils.integrity import read_sealed, write_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
FILE = "rank_check.json"
TOLERANCE = 0.01  # of what the adapter gains over the base


@dataclass(frozen=True)
class RankLoss:
    """The validation loss with the best approximation of each dW of a smaller rank.

    `rank` is that of every module; None: each its own energy rank. `delta` is how much the loss is over that of the
    whole adapter, between `low` and `high` with 95 % (paired bootstrap over rows); None where one row is all there is.
    """

    rank: int | None
    loss: float
    delta: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class RankCheck:
    """The losses of a run's adapter at its own and at smaller ranks, in nats per supervised token.

    `ranks` is by module its rank, and `energy_ranks` how many directions hold 90 % of |dW|_F^2. `loss_error` is the
    bootstrap standard error of `loss` over rows. `at_energy_ranks` truncates each module to its own energy rank,
    `at_fixed_ranks` all to one. `rank_pattern` can be pasted as `peft.rank_pattern`: by module name, the largest energy
    rank over layers. `step` is the run's last.
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
        """What the adapter gains over the base."""
        return self.base_loss - self.loss

    def is_unchanged(self, at: RankLoss) -> bool:
        """Whether the loss there is, with 95 %, less than 1 % of the adapter's gain above that of the whole adapter."""
        return at.high is not None and self.gain > 0 and at.high < TOLERANCE * self.gain

    @property
    def smallest_unchanged(self) -> int | None:
        """The smallest of the fixed ranks that leaves the loss unchanged."""
        return min((at.rank for at in self.at_fixed_ranks if at.rank and self.is_unchanged(at)), default=None)

    def write(self, lens_folder: Path) -> Path:
        """Keep it as `rank_check.json` beside the captures."""
        lens_folder.mkdir(parents=True, exist_ok=True)
        write_sealed(lens_folder / FILE, asdict(self))
        return lens_folder / FILE


def read_rank_check(folder: Path) -> RankCheck | None:
    """The rank check of a run's folder or of its lens folder; None where there is none.

    One that cannot be read is passed over with a warning.
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
        logger.warning("%s cannot be read (%s) and is passed over; measure it again with --check-rank", path, error)
        return None
