"""A rank that is larger than needed, and the file of the losses at smaller ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training_lens.analysis.findings.evidence import read_curve
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analysis.findings.interventions import (
    Claim,
    Intervention,
    SettingChange,
    decide_finding,
    read_interventions,
)
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.errors import DamagedFileError
from training_lens.utils.integrity import read_sealed, write_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
FILE = "rank_check.json"
TOLERANCE = 0.01  # of the adapter's gain over the base
ENERGY = 0.9  # the share of |dW|_F^2 in an energy rank
FAR_UNDER, FULL = 0.25, 0.9  # energy rank over rank
MOST = 0.5  # of the modules
CAPACITY = 2.0  # bits in a parameter
SATURATED = "The rank may be saturated"
RULE = Rule(
    code="rank",
    signature="few directions hold 90% of |dW|^2 in most modules, and truncating to them does not change the "
    "validation loss",
    threshold=f"at most {FAR_UNDER:g} r directions in over {MOST:.0%} of the modules, and a loss increase below "
    f"{TOLERANCE:.0%} of the adapter's gain over the base (upper end of the 95% interval); a rank used to over "
    f"{FULL:g} in the median may be too small, and saturated where the rows of an epoch also hold over {CAPACITY:g} "
    "bits for each parameter, by the losses before their first visit",
    source="LoRA paper, section 7 (arXiv 2106.09685); the loss is measured on this run's validation rows. The summed "
    "loss of a first visit bounds what there is to learn (LoRA Without Regret); 2 bits: arXiv 2404.05405",
    action="train with a lower peft.r or this peft.rank_pattern: fewer parameters at the same expected loss",
)
LARGER = Claim(
    question="rank",
    change="doubled",
    better="A larger rank is better",
    open="The rank may be too small",
    fine="A larger rank gains nothing",
    action="train with {setting}, or more if that still gains",
    trusts_short_gain=True,
    trusts_short_loss=False,  # the longer a run, the more it has to hold
)


@dataclass(frozen=True)
class RankLoss:
    """The validation loss with the best approximation of each dW of a smaller rank.

    `rank` applies to every module; None means each module's own rank that holds `share` of |dW|_F^2 (None in files of
    earlier versions: 0.9). `delta` is the increase over the loss of the whole adapter, `low` to `high` its 95 %
    interval (paired bootstrap over rows), None with a single row. `parameters` counts what the smaller adapter holds.
    """

    rank: int | None
    loss: float
    delta: float
    low: float | None
    high: float | None
    share: float | None = None
    parameters: int | None = None

    @property
    def label(self) -> str:
        """What is kept: `90%` of the energy, or rank `4`; as `training-lens rank --keep` takes it."""
        return str(self.rank) if self.rank else f"{self.share or ENERGY:.0%}"


@dataclass(frozen=True)
class RankCheck:
    """The losses of a run's adapter at its own and at smaller ranks, in nats per supervised token.

    `ranks` has the rank of each module, and `energy_ranks` how many directions hold 90 % of |dW|_F^2. `loss_error` is
    the bootstrap standard error of `loss` over rows. `at_energy_ranks` truncates each module to its own energy rank,
    `at_larger_shares` to those of larger shares, `at_fixed_ranks` all modules to one rank. `parameters` counts those of
    the whole adapter (None in files of earlier versions). `rank_pattern` has the largest energy rank over layers by
    module name, to use as `peft.rank_pattern`. `step` is the last step of the run.
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
    at_larger_shares: tuple[RankLoss, ...] = ()
    parameters: int | None = None

    @property
    def truncations(self) -> tuple[RankLoss, ...]:
        """All that was measured: by shares of the energy, then by fixed ranks."""
        return (self.at_energy_ranks, *self.at_larger_shares, *self.at_fixed_ranks)

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
    """The rank check in a run folder or lens folder; None if there is none, or with a warning if it is unreadable."""
    path = next((p for p in (folder / FILE, folder / "lens" / FILE) if p.is_file()), None)
    if path is None:
        return None
    try:
        values = read_sealed(path)
        values["at_energy_ranks"] = RankLoss(**values["at_energy_ranks"])
        for name in ("at_fixed_ranks", "at_larger_shares"):
            values[name] = tuple(RankLoss(**at) for at in values.get(name, ()))
        return RankCheck(**values)
    except (OSError, DamagedFileError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%s) and is ignored; measure it again with training-lens rank", path, error)
        return None


class _RankUse(NamedTuple):
    """At one step: how many of the changed modules use few directions, and the median share of r that they use."""

    step: int
    low: int
    known: int
    share: float


def check_rank(recording: Recording) -> Finding:
    """Whether another rank is better: by test runs at twice and half of it, or else by spectra and truncation."""
    finding, measured = _check_spectra(recording), read_interventions(recording.folder)
    larger = decide_finding(RULE, finding, measured, LARGER)
    test = measured.get("rank")
    doubled, halved = (test.find_change(name) if test else None for name in ("doubled", "halved"))
    if test is None or halved is None or (doubled and test.is_better(doubled)):
        return larger
    return _decide_halved(test, halved, finding)


def _decide_halved(test: Intervention, halved: SettingChange, finding: Finding) -> Finding:
    """Half of the rank is enough, or the rank is needed; what is within the noise leaves the spectra's finding."""
    text, evidence = test.describe("doubled", "halved"), {**finding.evidence, "intervention": asdict(test)}
    if test.is_long_enough and test.is_harmless(halved):
        action = f"train with {halved.setting}: half of the parameters at the same loss"
        return RULE.report_symptom(
            "note", "A smaller rank is enough", text, action=action, confidence=test.confidence, evidence=evidence
        )
    if halved.low is None or halved.low > 0:
        return RULE.report_fine("The rank is needed", text, test.confidence, evidence)
    return replace(finding, measured=f"{finding.measured}; {text}", evidence=evidence)


def _check_spectra(recording: Recording) -> Finding:
    """The spectrum alone is no proof: weak directions may matter for the loss."""
    used, modules = _measure_rank_use(recording), recording.modules
    if used is None:
        return RULE.report_inconclusive(
            "Not enough data on the rank",
            "no spectra of a changed weight",
            f"captures of the table {tables.SPECTRA}",
        )
    measured = (
        f"{used.low} of {used.known} modules hold 90% of |dW|^2 in at most {FAR_UNDER:g} r directions at step "
        f"{used.step} (median {used.share:.2g} r)"
    )
    evidence: dict[str, object] = {"low": used.low, "modules": used.known, "median_share": used.share}
    if used.share > FULL:
        decide = "a run with the same seed at twice the rank: its loss is lower if this rank is too small"
        bits = _measure_description(recording) / sum(m.rank * (m.in_features + m.out_features) for m in modules)
        if bits <= CAPACITY or np.isnan(bits):
            return RULE.report_inconclusive(LARGER.open, measured, decide, evidence)
        measured += f"; the rows of an epoch hold up to {bits:.3g} bits for each parameter of the adapter"
        return RULE.report_inconclusive(SATURATED, measured, decide, {**evidence, "bits_per_parameter": bits})
    if used.low <= MOST * used.known:
        return RULE.report_fine("The rank is used", measured, evidence=evidence)
    check = read_rank_check(recording.folder)
    if check is None or check.step < used.step:
        old = "" if check is None else f"; the rank check was made at step {check.step}"
        decide = "training-lens rank RUN, which measures the loss at smaller ranks"
        return RULE.report_inconclusive("The rank may be larger than needed", measured + old, decide, evidence)
    return _report_check(check, measured, evidence)


def _measure_rank_use(recording: Recording) -> _RankUse | None:
    """At the last step whose spectra show a change."""
    series = recording.series(tables.SPECTRA, "energy_rank")
    ranks = {module.name: module.rank for module in recording.modules}
    columns = [i for i, name in enumerate(series.names) if name in ranks]
    shares = series.values[:, columns] / np.array([ranks[series.names[i]] for i in columns], float)
    there = np.isfinite(shares) & (shares > 0)
    if not there.any():
        return None
    at = int(np.flatnonzero(there.any(1))[-1])
    known = shares[at][there[at]]
    return _RankUse(int(series.steps[at]), int((known <= FAR_UNDER).sum()), len(known), float(np.median(known)))


def _measure_description(recording: Recording) -> float:
    """The bits of the supervised tokens of an epoch, by the losses of its steps; NaN where they were not captured.

    The loss of rows that come for the first time, summed, is the length of a code for them.
    """
    steps, losses = read_curve(recording, tables.LOSS, "loss")
    counted, tokens = read_curve(recording, tables.LOSS, "supervised_tokens")
    epoch = min(recording.settings.get("steps_per_epoch") or 0, steps[-1] if len(steps) else 0)
    if not epoch or not np.array_equal(steps, counted):
        return np.nan
    first = steps <= max(epoch, steps[0])
    return float((losses * tokens)[first].mean() * epoch / np.log(2))


def _report_check(check: RankCheck, spectrum: str, evidence: dict[str, object]) -> Finding:
    at = check.at_energy_ranks
    interval = "unknown" if at.low is None or at.high is None else f"{at.low:.3g} to {at.high:.3g}"
    text = (
        f"{spectrum}; truncated to these, the loss on {check.rows} rows changes by {at.delta:+.3g} nats ({interval}), "
        f"where the adapter gains {check.gain:.3g}"
    )
    evidence |= {"delta": at.delta, "gain": check.gain, "rank_pattern": dict(check.rank_pattern)}
    evidence |= {"ranks": [a.rank for a in check.at_fixed_ranks], "deltas": [a.delta for a in check.at_fixed_ranks]}
    if at.high is None or check.gain <= 0:
        return RULE.report_inconclusive(
            "The rank may be larger than needed",
            text,
            "an adapter that improves on the base, and at least two validation rows",
            evidence,
        )
    if check.is_unchanged(at):
        pattern = ", ".join(f"{name}: {k}" for name, k in check.rank_pattern.items())
        return RULE.report_symptom(
            "note",
            "A smaller rank is enough",
            text,
            action=f"{RULE.action}: '{{{pattern}}}'",
            decide="a run with this pattern: truncating after training is not training at that rank",
            evidence=evidence,
        )
    smallest = check.smallest_unchanged
    also = f"; rank {smallest} in all modules does not change it" if smallest else ""
    return RULE.report_fine("The weak directions of dW matter for the loss", text + also, "likely", evidence)
