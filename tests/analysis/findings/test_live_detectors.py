"""What is watched step by step, and in the sampled answers: planted symptoms are found, usual noise is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from training_lens.analysis.findings import Finding
from training_lens.analysis.findings.answer_findings import check_answers
from training_lens.analysis.findings.loss_spike import LossSpike, RowLoss, SpikeDetector, SpikeRows, report_spike

Find = Callable[..., Finding]
NO_RMS = (np.zeros(0), np.zeros(0))


def watch(losses: np.ndarray, norms: np.ndarray | None = None) -> list[LossSpike]:
    detector = SpikeDetector()
    pairs = zip(losses.tolist(), (losses if norms is None else norms).tolist(), strict=True)
    return [spike for step, pair in enumerate(pairs, 1) if (spike := detector.observe(step, *pair))]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("spread", [0.05, 0.3, 0.8])
def test_usual_noise_is_no_spike(seed: int, spread: float) -> None:
    """Skewed and of heavy tails, as of small batches; falling fast at first; with a rare domain that is harder."""
    noise = np.random.default_rng(seed)
    losses = (4 / (1 + np.arange(500) / 20) + 0.3) * noise.lognormal(0, spread, 500)
    norms, hard = noise.lognormal(0, 0.4, 500) * losses**0.5, np.where(noise.random(500) < 0.1, 3.0, 1.0)
    assert not watch(losses, norms) and len(watch(losses * hard, norms * hard)) <= 1


def test_a_loss_and_a_gradient_norm_that_both_jump_are_a_spike_in_noise() -> None:
    noise = np.random.default_rng(0)
    losses, norms = noise.lognormal(0, 0.25, 100), noise.lognormal(0, 0.25, 100)
    losses[60] = 4.5
    assert not watch(losses, norms)
    norms[60] = 6.0
    assert [spike.step for spike in watch(losses, norms)] == [61]


def test_a_jump_is_a_spike_and_does_not_become_the_level() -> None:
    losses = 1 + np.random.default_rng(0).normal(0, 0.05, 100)
    losses[60:64] = 6.0
    assert [spike.step for spike in watch(losses)] == [61, 62, 63, 64]


SPIKE = LossSpike(step=61, loss=6.0, level=1.0, z=100.0, most=1.2)


def batch(*losses: float, base: Sequence[float] = (), others: float = 5.0, similar: float = 5.0) -> SpikeRows:
    """Rows a:1, a:2, ... with these losses; without `base`, nothing was measured of the base."""
    rows = [RowLoss(f"a:{i + 1}", loss, base[i] if base else np.nan) for i, loss in enumerate(losses)]
    return SpikeRows(rows, *(np.full(16 if base else 0, loss) for loss in (others, similar)))


def test_rows_far_above_are_named_with_their_losses() -> None:
    found = report_spike(SPIKE, batch(1.0, 9.5, 0.9, 11.0), NO_RMS, True)
    assert found and found.code == "poisoned_batch" and "2 of its 4 rows" in found.measured
    assert "a:4 (11), a:2 (9.5)" in found.measured


def test_rows_that_are_hard_for_the_base_are_poisoned_unless_others_are_like_them() -> None:
    """Also where their loss is not twice the usual; a rare domain is as hard elsewhere."""
    odd = batch(1.0, 2.0, base=[5.0, 8.0])
    found = report_spike(SPIKE, odd, NO_RMS, True)
    assert (
        found and found.code == "poisoned_batch" and "1 of its 2 rows" in found.measured and "a:2 (2)" in found.measured
    )
    assert report_spike(SPIKE, batch(1.0, 2.0, base=[5.0, 8.0], similar=7.6), NO_RMS, True) is None
    usual = report_spike(SPIKE, batch(1.0, 2.0, base=[5.0, 5.1], similar=7.6), NO_RMS, True)
    assert usual and usual.code == "loss_spike"


def test_an_update_spike_before_means_the_optimizer() -> None:
    steps, rms = np.arange(1, 61), np.ones(60)
    rms[56] = 7.0
    found = report_spike(SPIKE, batch(1.4, 1.5), (steps, rms), True)
    assert found and found.code == "loss_spike" and "update RMS of Adam was 7 at step 57" in found.measured
    rms[56], rms[40] = 1.0, 7.0  # too early
    late = report_spike(SPIKE, batch(1.4), (steps, rms), True)
    assert late and "no row of it stands out" in late.measured


@pytest.mark.parametrize("seed", range(10))
def test_a_jump_is_seen_before_the_level_is_known(seed: int) -> None:
    """Steps of a falling loss with the noise of small batches: no spike; one step far above all: a spike."""
    noise = np.random.default_rng(seed)
    losses = (2 + 4 * np.exp(-np.arange(20) / 6)) * noise.lognormal(0, 0.1, 20)
    assert not watch(losses)
    losses[11] = 1.4 * losses.max()
    assert [spike.step for spike in watch(losses)] == [12]


def answer(number: int, generated: str, ended: bool | None = True, loops: bool = False) -> dict[str, Any]:
    texts = {"id": f"rows:{number}", "prompt": f"Say {number}", "expected": f"{number}", "generated": generated}
    return {**texts, "ended": ended, "loops": loops}


def codes(answers: list[dict[str, Any]], base: list[dict[str, Any]] | None = None) -> set[str]:
    return {found.code for found in check_answers(answers, base or [])}


def test_answers_that_differ_and_end_show_nothing() -> None:
    assert not codes([answer(i, f"It is {i}.") for i in range(4)])
    assert not codes([answer(i, f"{i}", ended=None) for i in range(4)])  # the right ones have no end either


def test_repetition_counts_where_the_base_does_not_repeat_as_much() -> None:
    looping = [answer(i, f"{i} a a a a", loops=i < 2) for i in range(4)]
    assert codes(looping) == {"repetition"}
    assert not codes(looping, base=looping) and not codes(looping[1:])


def test_missing_ends_and_equal_answers_are_found() -> None:
    equal = [answer(i, "I do not know", ended=False) for i in range(4)]
    assert codes(equal) == {"endless_answers", "prompt_ignored"}
    assert "prompt_ignored" not in codes([{**a, "expected": "I do not know"} for a in equal])
    assert "prompt_ignored" not in codes([{**a, "loops": True} for a in equal])  # a finding of its own


def test_kl_that_climbs_beside_a_flat_held_out_loss_is_forgetting(finding: Find, healthy: Any) -> None:
    assert finding("forgetting", healthy).severity == "fine"
    steps = np.arange(10, 201, 10)
    healthy.values("evaluation", "loss")[:] = 2 - 0.5 * (steps < 60) * (60 - steps) / -50
    healthy.values("divergence", "kl")[:] = 0.01 * steps
    found = finding("forgetting", healthy)
    assert found.severity in ("note", "warning") and found.confidence == "likely"
    assert found.evidence["kl_end"] > found.evidence["kl_at_best"]


def test_a_gain_that_came_early_makes_all_later_divergence_forgetting(finding: Find, healthy: Any) -> None:
    """Also where KL has stopped rising; and a KL above the gain is not fine, whatever its course."""
    steps = np.arange(10, 201, 10)
    healthy.values("evaluation", "loss")[:] = 1.0 + 0.005 * np.cos(steps)
    healthy.values("divergence", "loss")[:] = 1.0
    healthy.values("divergence", "kl")[:] = 0.5 + np.minimum(steps, 100) / 100
    found = finding("forgetting", healthy)
    assert (found.severity, found.confidence, found.where) == ("note", "likely", "from step 10")
    healthy.values("divergence", "kl")[:] = 3.0
    far = finding("forgetting", healthy)
    assert far.confidence == "inconclusive" and "GENERAL_TEXT" in far.decide


@pytest.mark.parametrize(("cosine", "severity"), [(0.05, "fine"), (0.5, "fine"), (0.97, "note")])
def test_gradients_that_agree_mean_a_large_batch(finding: Find, healthy: Any, cosine: float, severity: str) -> None:
    columns = healthy.tables["adapter_gradients"][1]
    columns["cosine_previous"] = np.full_like(columns["norm_a"], cosine)
    found = finding("batch_large", healthy)
    assert found.severity == severity
    assert found.evidence["ratio"] > 10 if severity == "note" else found.title.startswith("The batch is not")
