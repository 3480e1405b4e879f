"""Each finding changes exactly at its threshold: a run just below it, and the same run just above it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_lens.analysis.findings import Finding, RankCheck, RankLoss
from training_lens.analysis.findings.evidence import HeldOut, measure_scatter
from training_lens.core.recording import Recording
from training_lens.measures.curves import log_slope, point_noise, remaining_gain

Find = Callable[..., Finding]
Plant = Callable[[Any, float], None]
INCONCLUSIVE = "inconclusive"


def outcome(found: Finding) -> str:
    """The severity, or that it is inconclusive."""
    return INCONCLUSIVE if found.confidence == INCONCLUSIVE else found.severity


def noise(points: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, points)


def tilt(steps: np.ndarray, values: np.ndarray, errors: float) -> np.ndarray:
    """The values on another slope against ln(steps), which is `errors` times its standard error."""
    fit = log_slope(steps, values)
    return values + (errors * fit.error - fit.value) * np.log(steps)


def keep_steps(run: Any, steps: float, *names: str) -> None:
    for name in names:
        at, columns = run.tables[name]
        run.tables[name] = (at[: int(steps)], {measure: values[: int(steps)] for measure, values in columns.items()})


def keep_layers(run: Any, layers: float) -> None:
    count = 2 * int(layers)  # two modules each
    run.modules = run.modules[:count]
    for name in ("adapter_weights", "adapter_gradients", "base_weights", "optimizer_state", "spectra"):
        at, columns = run.tables[name]
        run.tables[name] = (at, {measure: values[:, :count] for measure, values in columns.items()})


# ------------------------------------------------------------------------------------------------ untrained, nonfinite


def idle(run: Any, steps: float) -> None:
    run.values("adapter_weights", "norm_step")[:] = 0
    keep_steps(run, steps, "adapter_weights")


def last_infinite_gradient(run: Any, step: float) -> None:
    run.values("adapter_gradients", "norm_a")[int(step) - 1, 3] = np.inf


# -------------------------------------------------------------------------------------------------------------- layers


UNITS = np.repeat([-3, -2, -1, 0, 0, 1, 2, 3], 2)  # of the 8 modules of each of two types


def spread(run: Any, unit: float) -> None:
    """Gradients and steps that are constant over the run; logarithms of 8 modules of a type are -3 to 3 units."""
    for measure in ("norm_a", "norm_b"):
        run.values("adapter_gradients", measure)[:] = np.exp(unit * UNITS)
    run.values("adapter_weights", "norm_step")[:] = 1e-3


def grow(run: Any, factor: float, siblings: float = 1.0) -> None:
    for measure in ("norm_a", "norm_b"):
        values = run.values("adapter_gradients", measure)
        values[120:] *= siblings
        values[120:, 6] *= factor / siblings


def factor_from_type(run: Any, factor: float) -> None:
    spread(run, 0.1)
    grow(run, factor * np.exp(0.05))  # the median of the type moves up by half a unit


def own_factor(run: Any, factor: float) -> None:
    spread(run, 0.01)
    grow(run, factor, siblings=0.02)


def robust_z_of_a_hundredfold(run: Any, z: float) -> None:
    """Of the change: siblings that were alike change by -3 to 3 units."""
    unit = np.log(100) / (z * 1.4826 * 2 + 0.5)  # the median absolute deviation is two units
    spread(run, 0)
    for measure in ("norm_a", "norm_b"):
        run.values("adapter_gradients", measure)[120:] *= np.exp(unit * UNITS)
    grow(run, 100)


def few_captures(run: Any, steps: float) -> None:
    for name in ("adapter_weights", "adapter_gradients"):
        at, columns = run.tables[name]
        last = slice(-int(steps), None)
        run.tables[name] = (at[last], {measure: values[last] for measure, values in columns.items()})


def captures_that_end(run: Any, step: float) -> None:
    keep_steps(run, step, "adapter_weights", "adapter_gradients")


# ----------------------------------------------------------------------------------------------------------- rate_high


def strength(run: Any, ratio: float) -> None:
    run.values("adapter_weights", "norm_update")[:] = 10 * ratio


def constant_rms(run: Any) -> None:
    for side in "ab":
        run.values("optimizer_state", f"update_rms_{side}")[:] = 1.0


def spike_height(run: Any, height: float) -> None:
    constant_rms(run)
    run.values("optimizer_state", "update_rms_b")[[50, 100, 150]] = height


def spike_height_over_the_median(run: Any, height: float) -> None:
    for side in "ab":
        run.values("optimizer_state", f"update_rms_{side}")[:] = 2.0
    run.values("optimizer_state", "update_rms_a")[[50, 100, 150]] = 2 * height


def spike_count(run: Any, count: float) -> None:
    constant_rms(run)
    run.values("optimizer_state", "update_rms_b")[50 : 50 + int(count)] = 5


def spike_in_warm_up(run: Any, first: float) -> None:
    constant_rms(run)
    run.values("loss", "lr")[:] = np.minimum(np.arange(200), 20)  # highest at step 21
    run.values("optimizer_state", "update_rms_b")[int(first) - 1 : int(first) + 2] = 5


def low_rms(run: Any, level: float) -> None:
    constant_rms(run)
    for side in "ab":
        run.values("optimizer_state", f"update_rms_{side}")[150:] = level


def loss_left(run: Any, share: float) -> None:
    low_rms(run, 0.01)
    run.values("loss", "loss")[:] = np.linspace(3, 2.9, 200)
    run.values("loss", "loss")[-10:] = 3 * share


def clipped_steps(run: Any, steps: float) -> None:
    """Of 199 after the first, which has the highest rate: 99 at the end, and others at the start."""
    clip = run.values("loss", "clip")
    clip[:] = 1
    clip[101:] = 0.4
    clip[1 : int(steps) - 98] = 0.9


def clip_at_the_end(run: Any, factor: float) -> None:
    run.values("loss", "clip")[101:] = factor


def divergence_climb(run: Any, climb: float) -> None:
    run.values("divergence", "kl")[:] = 1.0
    run.values("divergence", "kl")[-1] = climb
    run.values("evaluation", "loss")[5:] += np.linspace(0, 2, 15)


def divergence_points(run: Any, points: float) -> None:
    divergence_climb(run, 9.0)
    run.values("divergence", "kl")[int(points) - 1] = 9.0
    keep_steps(run, points, "divergence")


def best_held_out_at(run: Any, index: float) -> None:
    divergence_climb(run, 9.0)
    run.values("evaluation", "loss")[:] = 2 + 0.1 * np.abs(np.arange(20) - index)


def smoothed_loss_over_start(run: Any, noises: float) -> None:
    """The base's held-out loss is the estimate of the start, and the smoothed loss is above it by so many noises."""
    losses = run.values("loss", "loss")
    losses[:] = 3 + 0.05 * noise(200)
    losses[50:60] += 1
    highest = np.convolve(losses, np.full(5, 0.2), "valid").max()
    run.tables["evaluation"][1]["base_loss"] = np.full(20, highest - noises * point_noise(losses[100:]))


def held_out_over_base(run: Any, noises: float) -> None:
    losses = run.values("evaluation", "loss")
    losses[:] = 5 + 0.05 * noise(20)
    run.tables["evaluation"][1]["base_loss"] = np.full(20, losses[-1] - noises * point_noise(losses))


# ------------------------------------------------------------------------------------------------------------ rate_low


def slow(run: Any, cosine: float = 0.6, late: float = 1.0, straightness: float = 1.0) -> None:
    """A straight run at a steady rate whose held-out loss falls against ln(steps), in its later half `late` as fast."""
    run.values("loss", "lr")[:] = 1e-3
    fall(run, run.tables["evaluation"][0], late)
    steps, moves = run.tables["adapter_weights"][0], run.values("adapter_weights", "norm_step")
    path = moves[0] * steps[0] + np.trapezoid(moves, steps, axis=0)
    run.values("adapter_weights", "norm_update")[:] = straightness * path
    run.values("adapter_gradients", "cosine_mean")[:] = cosine


def slow_under_a_falling_rate(run: Any, late: float) -> None:
    """Against the logarithm of the sum of rates, the held-out loss falls `late` as fast beyond half of that sum."""
    rates = run.values("loss", "lr").copy()
    slow(run)
    run.values("loss", "lr")[:] = rates
    fall(run, np.cumsum(rates)[run.tables["evaluation"][0] - 1], late)


def fall(run: Any, at: np.ndarray, late: float) -> None:
    half = at[-1] / 2
    run.values("evaluation", "loss")[:] = 3 - 0.35 * (
        np.log(np.minimum(at, half) / at[0]) + late * np.log(np.maximum(at, half) / half)
    )


def small_divergence(run: Any, share: float) -> None:
    slow(run, cosine=0.1)
    run.values("divergence", "kl")[-1] = share * 3.2  # of the base's loss


def slow_and_short(run: Any, steps: float) -> None:
    slow(run)
    keep_steps(run, steps, "adapter_weights", "loss")


# -------------------------------------------------------------------------------------------------------- memorization


def training_against_held_out(run: Any, ratio: float) -> None:
    """No slope of the training loss, which is this ratio of a held-out loss that rises to 3."""
    run.values("evaluation", "loss")[:] = np.linspace(2, 3, 20)
    run.values("loss", "loss")[:] = 3 * ratio + 1e-4 * tilt(np.arange(1, 201), noise(200), 0)


def training_slope(run: Any, errors: float) -> None:
    """Of the training loss since the best held-out one, which is the first."""
    run.values("evaluation", "loss")[:] = np.linspace(2, 3, 20)
    since = slice(9, None)
    steps = np.arange(1, 201)
    run.values("loss", "loss")[since] = tilt(steps[since], 3 + 0.05 * noise(191), -errors)


def held_out_rise(run: Any, share: float) -> None:
    """On a line against ln(steps) from its lowest value, at step 60."""
    at = run.tables["evaluation"][0]
    losses = run.values("evaluation", "loss")
    losses[:] = 2.5
    losses[5:] = 2 * (1 + share * np.log(at[5:] / 60) / np.log(3))  # the last quarter's median is at step 180


def held_out_points(run: Any, points: float) -> None:
    keep_steps(run, points, "evaluation", "divergence")


def held_out_points_without_gap(run: Any, points: float) -> None:
    held_out_points(run, points)
    run.values("loss", "loss")[:] = 2.0


def epoch_steps(run: Any, steps: float) -> None:
    held_out_rise(run, 0.5)
    run.values("loss", "epoch")[:] = np.arange(1, 201) / steps


# --------------------------------------------------------------------------------------------------------------- tables

# code, what is planted, a value just on one side and what is found, a value just on the other and what is found
CASES: list[tuple[str, Plant, float, str, float, str]] = [
    ("untrained", idle, 2, INCONCLUSIVE, 3, "problem"),
    ("nonfinite", last_infinite_gradient, 199, "note", 200, "problem"),
    ("layers", factor_from_type, 9.5, "fine", 10.5, INCONCLUSIVE),
    ("layers", factor_from_type, 29.5, INCONCLUSIVE, 30.5, "problem"),
    ("layers", own_factor, 2.9, "fine", 3.1, "problem"),
    ("layers", robust_z_of_a_hundredfold, 3.4, "fine", 3.6, INCONCLUSIVE),
    ("layers", robust_z_of_a_hundredfold, 5.9, INCONCLUSIVE, 6.1, "problem"),
    ("layers", keep_layers, 3, INCONCLUSIVE, 4, "fine"),
    ("layers", few_captures, 5, INCONCLUSIVE, 6, "fine"),
    ("layers", captures_that_end, 162, INCONCLUSIVE, 163, "fine"),  # three after step 160 of 200
    ("rate_high", strength, 0.99, "fine", 1.01, INCONCLUSIVE),
    ("rate_high", spike_height, 2.95, "fine", 3.05, INCONCLUSIVE),
    ("rate_high", spike_height_over_the_median, 2.95, "fine", 3.05, INCONCLUSIVE),
    ("rate_high", spike_count, 2, "fine", 3, INCONCLUSIVE),
    ("rate_high", spike_in_warm_up, 21, "fine", 22, INCONCLUSIVE),
    ("rate_high", low_rms, 0.105, "fine", 0.095, INCONCLUSIVE),
    ("rate_high", loss_left, 0.24, "fine", 0.26, INCONCLUSIVE),
    ("rate_high", clipped_steps, 99, "fine", 100, INCONCLUSIVE),
    ("rate_high", clip_at_the_end, 0.26, "fine", 0.24, INCONCLUSIVE),
    ("rate_high", divergence_climb, 1.45, "fine", 1.55, INCONCLUSIVE),
    ("rate_high", divergence_points, 3, "fine", 4, INCONCLUSIVE),
    ("rate_high", best_held_out_at, 10, "fine", 9, INCONCLUSIVE),
    ("rate_high", smoothed_loss_over_start, 2.9, "fine", 3.1, INCONCLUSIVE),
    ("rate_high", held_out_over_base, 2.9, "fine", 3.1, INCONCLUSIVE),
    ("rate_high", lambda run, steps: keep_steps(run, steps, "loss"), 9, INCONCLUSIVE, 10, "fine"),
    ("rate_low", lambda run, straight: slow(run, straightness=straight), 0.79, INCONCLUSIVE, 0.81, "warning"),
    ("rate_low", lambda run, bend: slow(run, 0.0, 0.3, bend), 0.61, INCONCLUSIVE, 0.59, "fine"),
    ("rate_low", lambda run, cosine: slow(run, cosine=cosine), 0.29, INCONCLUSIVE, 0.31, "warning"),
    ("rate_low", lambda run, late: slow(run, late=late), 0.39, INCONCLUSIVE, 0.41, "warning"),
    ("rate_low", slow_under_a_falling_rate, 0.39, INCONCLUSIVE, 0.41, "warning"),
    ("rate_low", small_divergence, 0.0101, INCONCLUSIVE, 0.0099, "warning"),
    ("rate_low", slow_and_short, 49, INCONCLUSIVE, 50, "warning"),
    ("memorization", training_against_held_out, 0.51, INCONCLUSIVE, 0.49, "warning"),
    ("memorization", training_slope, 2.9, INCONCLUSIVE, 3.1, "warning"),
    ("memorization", held_out_rise, 0.019, INCONCLUSIVE, 0.021, "warning"),
    ("memorization", held_out_points_without_gap, 3, INCONCLUSIVE, 4, "fine"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "plant", "one", "found", "other", "beyond"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_a_finding_changes_at_its_threshold(
    finding: Find, sound: Any, code: str, plant: Plant, one: float, found: str, other: float, beyond: str
) -> None:
    settings = {"steps_per_epoch": 1} if code == "memorization" else {}
    for value, expected in ((one, found), (other, beyond)):
        run = sound()
        plant(run, value)
        result = finding(code, run, **settings)
        assert outcome(result) == expected, (value, result.title, result.measured)


@pytest.mark.parametrize(("spikes", "expected"), [(3, "fine"), (4, INCONCLUSIVE)])
def test_spikes_take_one_percent_of_a_longer_run(finding: Find, sound: Any, spikes: int, expected: str) -> None:
    run = sound(steps=400)
    spike_count(run, spikes)
    assert outcome(finding("rate_high", run, total_steps=400)) == expected


@pytest.mark.parametrize(("above", "expected"), [(-0.01, "warning"), (0.01, "problem")])
def test_a_rate_too_high_is_a_problem_where_the_loss_ends_above_its_start(
    finding: Find, healthy: Any, above: float, expected: str
) -> None:
    """Within the noise, so that it is no sign by itself."""
    losses = healthy.values("loss", "loss")
    losses[:] = 3 + 0.05 * tilt(np.arange(1, 201), noise(200), 0)
    start = max(losses[0], np.median(losses[:5]))
    losses[-10:] += start + above - np.median(losses[-10:])
    strength(healthy, 2)
    spike_height(healthy, 5)
    found = finding("rate_high", healthy)
    assert found.severity == expected and len(found.evidence["signs"]) == 2


@pytest.mark.parametrize(("errors", "expected"), [(2.9, "fine"), (3.1, "note")])
def test_a_drop_at_an_epoch_end_takes_three_standard_errors(
    finding: Find, sound: Any, errors: float, expected: str
) -> None:
    def find(drop: float) -> Finding:
        run = sound()
        steps = np.arange(1, 201)
        run.values("evaluation", "loss")[:] = 2 + 0.001 * tilt(np.arange(10, 201, 10), noise(20), 0)
        run.values("loss", "loss")[:] = 3 - drop * ((steps - 1) // 50) + 0.05 * noise(200)
        return finding("memorization", run, steps_per_epoch=50)

    flat = find(0.0).evidence  # the error does not depend on the drop
    found = find(errors * flat["drop_error"] - flat["drop"])
    assert found.evidence["drop"] == pytest.approx(errors * flat["drop_error"])
    assert outcome(found) == expected


def test_the_error_of_several_drops_is_that_of_their_mean(finding: Find, healthy: Any) -> None:
    losses = healthy.values("loss", "loss")
    losses[:] = 3 + 0.05 * noise(200)
    away = np.arange(100) - 49.5  # from an epoch's end, with a whole epoch on each side
    design = np.stack([away > 0, np.ones(100), away, away * (away > 0)], 1)
    drops, errors = [], []
    for start in (0, 50, 100):
        (jump, *_), squares, *_ = np.linalg.lstsq(design, losses[start : start + 100], rcond=None)
        drops.append(-jump)
        errors.append(np.sqrt(squares[0] / 96 * np.linalg.inv(design.T @ design)[0, 0]))
    found = finding("memorization", healthy, steps_per_epoch=50)
    assert found.evidence["drop"] == pytest.approx(np.mean(drops), rel=1e-4)
    assert found.evidence["drop_error"] == pytest.approx(np.sqrt(np.square(errors).sum()) / 3, rel=1e-4)


@pytest.mark.parametrize(
    ("per_epoch", "logged", "title"),
    [
        (200, 100, "No row was seen twice"),  # what the settings say comes first
        (199, 100, "Overfitting"),
        (None, 200, "No row was seen twice"),
        (None, 199, "Overfitting"),
        (None, np.inf, "Overfitting"),  # unknown: the logged epoch stays 0
    ],
)
def test_one_epoch_is_known_from_the_settings_or_the_log(
    finding: Find, healthy: Any, per_epoch: int | None, logged: float, title: str
) -> None:
    epoch_steps(healthy, logged)
    found = finding("memorization", healthy, steps_per_epoch=per_epoch)
    assert found.title == title
    assert logged < np.inf or "no drop at an epoch end could be measured" in found.measured


# ------------------------------------------------------------------------------------------------- the held-out loss

AT = np.arange(10, 121, 10)


@pytest.mark.parametrize(
    ("errors", "expected"), [(-3.1, "falls"), (-2.9, "flat"), (2.9, "flat"), (3.1, "rises")]
)  # fmt: skip
def test_a_direction_takes_three_standard_errors(errors: float, expected: str) -> None:
    losses = tilt(AT[:4], np.array([0.0, 0.4, -0.1, 0.2]), errors)
    assert HeldOut("set", AT[:4], 0.1 + losses - losses.min(), np.nan).find_direction() == expected
    assert HeldOut("set", AT[:3], losses[:3], np.nan).find_direction() == "unknown"


@pytest.mark.parametrize(("scatters", "expected"), [(3.9, "flat"), (4.1, "rises")])
def test_far_above_the_best_is_four_times_the_scatter_since_then(scatters: float, expected: str) -> None:
    since = 2 + 0.1 * tilt(AT[1:7], np.array([0.5, -1.0, 0.8, -0.7, 0.9, -0.6]), 0)
    best = np.median(since[-2:]) - scatters * measure_scatter(AT[1:7], since)
    assert HeldOut("set", AT[:7], np.array([best, *since]), np.nan).find_direction() == expected
    few = HeldOut("set", AT[:5], np.array([best - 1, *since[:4]]), np.nan)  # four points since the best: too few
    assert few.find_direction() == "flat"


def test_the_scatter_is_the_standard_deviation_about_the_line() -> None:
    losses = 3 - 0.2 * np.log(AT) + 0.1 * noise(12)
    residuals = losses - np.polyval(np.polyfit(np.log(AT), losses, 1), np.log(AT))
    assert measure_scatter(AT, losses) == pytest.approx(np.sqrt(np.square(residuals).sum() / 10))


# ----------------------------------------------------------------------------------------------------------- converged


@pytest.fixture
def converged(sound: Any, record: Callable[..., Recording]) -> Callable[..., Finding]:
    """The finding for a gain of so many of its errors, where a rank check measured this noise of one loss."""
    from training_lens.analysis.findings.convergence import check_convergence

    def find(gain_errors: float, noise_of_most: float, rate: Any = 1e-3) -> Finding:
        run = sound()
        at = run.tables["evaluation"][0]
        losses = tilt(at[10:], 1 + 0.05 * noise(10), -gain_errors)
        run.values("evaluation", "loss")[10:] = losses
        run.values("loss", "lr")[:] = rate
        gain = remaining_gain(at[10:], losses, 2 * at[-1])
        recording = record(run.tables, {"total_steps": 200})
        replace(CHECK, loss_error=noise_of_most * (gain.value + 2 * gain.error)).write(recording.folder)
        return check_convergence(recording)

    return find


CHECK = RankCheck(
    step=200, rows=50, supervised_tokens=900, base_loss=3.0, loss=2.0, loss_error=0.02, ranks={"q_proj": 16},
    energy_ranks={"q_proj": 2}, at_energy_ranks=RankLoss(None, 2.002, 0.002, -0.001, 0.005), at_fixed_ranks=(),
    rank_pattern={"q_proj": 2},
)  # fmt: skip


@pytest.mark.parametrize(
    ("gain_errors", "noise_of_most", "is_converged"),
    [
        (1.0, 1 / 4 + 0.01, True),  # the gain may be 0: four noises
        (1.0, 1 / 4 - 0.01, False),
        (5.0, 1.01, True),  # a gain that is surely there: one noise
        (5.0, 0.99, False),
    ],
)
def test_a_run_has_converged_where_the_gain_is_below_the_noise(
    converged: Callable[..., Finding], gain_errors: float, noise_of_most: float, is_converged: bool
) -> None:
    assert (converged(gain_errors, noise_of_most).title == "Converged") is is_converged


@pytest.mark.parametrize(("lowest", "is_converged"), [(0.91, True), (0.89, False)])
def test_a_rate_is_steady_above_nine_tenths_of_its_peak(
    converged: Callable[..., Finding], lowest: float, is_converged: bool
) -> None:
    rates = np.append(np.full(199, 1e-3), lowest * 1e-3)
    assert (converged(1.0, 1.0, rates).title == "Converged") is is_converged


@pytest.mark.parametrize(("gain_errors", "is_converged"), [(1.0, True), (1.9, False)])
def test_without_a_rank_check_the_noise_is_the_scatter_about_the_line(
    sound: Any, record: Callable[..., Recording], gain_errors: float, is_converged: bool
) -> None:
    from training_lens.analysis.findings.convergence import check_convergence

    run = sound()
    at = run.tables["evaluation"][0][10:]
    losses = tilt(at, 1 + 0.05 * noise(10), -gain_errors)
    gain = remaining_gain(at, losses, 2 * at[-1])
    assert (gain.value + 2 * gain.error < 4 * measure_scatter(at, losses)) is is_converged
    run.values("loss", "lr")[:], run.values("evaluation", "loss")[10:] = 1e-3, losses
    assert (check_convergence(record(run.tables, {"total_steps": 200})).title == "Converged") is is_converged


# ---------------------------------------------------------------------------------------------------------------- rank


@pytest.mark.parametrize(("energy", "low", "expected"), [
    (4, 9, INCONCLUSIVE), (5, 9, "fine"), (4, 8, "fine"),
])  # fmt: skip
def test_few_directions_are_a_quarter_of_the_rank_in_over_half_of_the_modules(
    finding: Find, healthy: Any, energy: int, low: int, expected: str
) -> None:
    healthy.values("spectra", "energy_rank")[:, :low] = energy
    assert outcome(finding("rank", healthy)) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"at_energy_ranks": RankLoss(None, 2.0, 0.0, 0.0, 0.0099)}, "note"),
        ({"at_energy_ranks": RankLoss(None, 2.0, 0.0, 0.0, 0.0101)}, "fine"),
        ({"step": 199}, INCONCLUSIVE),
        ({"step": 201}, "note"),
        ({"base_loss": 2.0}, INCONCLUSIVE),
        ({"base_loss": 2.51}, "note"),
        ({"base_loss": 2.49}, "fine"),  # an increase of up to 0.005 is more than 1 % of this gain
    ],
    ids=str,
)
def test_a_rank_check_decides_at_one_percent_of_the_gain(
    healthy: Any, record: Callable[..., Recording], tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    from training_lens.analysis.findings.rank import check_rank

    healthy.values("spectra", "energy_rank")[:] = 2
    recording = record(healthy.tables, {"total_steps": 200})
    replace(CHECK, **change).write(recording.folder)
    assert outcome(check_rank(recording)) == expected
