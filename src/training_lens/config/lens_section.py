"""The lens: what is captured while training runs, and how much room and time it may take."""

from __future__ import annotations

from typing import Literal

from training_lens.config.section import Section, setting

FindingCode = Literal[
    "untrained", "nonfinite", "self_check", "layers", "rate_high", "rate_low", "batch_large", "memorization",
    "forgetting", "converged", "rank", "loss_spike", "poisoned_batch", "repetition", "endless_answers",
    "prompt_ignored",
]  # fmt: skip


class LensSection(Section):
    """What the lens captures of a run (training-lens analyze, report, export). It never changes the adapter."""

    enabled: bool = setting(True, "capture at all")
    collectors: list[str] | None = setting(None, "names of collectors, your own among them; null: all built-in ones")
    scalars_every: int | None = setting(
        None,
        "norms, directions and the self-check every so many steps; null: each of the first 20, then as "
        "often as takes 1 % of the time, and about 200 times in a run at least",
        ge=1,
    )
    spectra_every: int | None = setting(
        None, "spectra every so many steps; null: as often as takes 0.25 % of the time", ge=1
    )
    probe_every: int | None = setting(
        None, "activations and KL on the probe set every so many steps; null: as 0.5 % of the time allows", ge=1
    )
    snapshot_every: int | None = setting(
        None, "A and B whole every so many steps; null: 4 to 8 in a run, as 0.25 % of the time allows", ge=1
    )
    probe_tokens: int = setting(
        512, "tokens of the probe set: validation rows, or training rows where there are none; 0: none", ge=0
    )
    keep_probe: bool = setting(
        False, "save the probe set's tokens as lens/probe.safetensors; otherwise only what is measured of them"
    )
    flush_seconds: float = setting(30.0, "captures go to disk at least so often; a kill loses what is younger", ge=0)
    scalars_megabytes: int = setting(
        64, "most room of scalars and spectra; beyond it, of old steps every second is dropped", ge=1
    )
    snapshots_megabytes: int = setting(256, "most room of snapshots; beyond it, every second is dropped", ge=0)
    row_losses_megabytes: int = setting(
        64,
        "most room of the losses of each training row at its visits (training-lens explain rows); where all visits do "
        "not fit, one row in so many is recorded that they do; 0: none",
        ge=0,
    )
    keep_states: int = setting(
        6,
        "states of the run that stay in lens/states, evenly spaced: adapter, optimizer and random state, from which "
        "explanations replay it; 0: none",
        ge=0,
    )
    states_megabytes: int = setting(
        1024, "most room of these states, each about three times the adapter; beyond it, fewer are kept", ge=0
    )
    live: bool = setting(True, "show findings while the run trains, and write them to logs/findings.jsonl")
    stop_on: list[FindingCode] = setting(
        [], "codes of findings that stop the run when they arise; what is saved is the best validated step"
    )
    report: bool = setting(True, "write reports/lens.html when training ends")
