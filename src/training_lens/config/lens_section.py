"""The lens: what is captured while training runs, and how much room and time it may take."""

from __future__ import annotations

from pydantic import Field

from training_lens.config.section import Section


class LensSection(Section):
    """What the lens captures of a run (training-lens analyze, report, export). It never changes the adapter."""

    enabled: bool = Field(True, description="capture at all")
    collectors: list[str] | None = Field(
        None, description="names of collectors, your own among them; null: all built-in ones"
    )
    scalars_every: int | None = Field(
        None,
        ge=1,
        description="norms, directions and the self-check every so many steps; null: each of the first 20, then as "
        "often as takes 1 % of the time, and about 200 times in a run at least",
    )
    spectra_every: int | None = Field(
        None, ge=1, description="spectra every so many steps; null: as often as takes 0.25 % of the time"
    )
    probe_every: int | None = Field(
        None,
        ge=1,
        description="activations and KL on the probe set every so many steps; null: as 0.5 % of the time allows",
    )
    snapshot_every: int | None = Field(
        None, ge=1, description="A and B whole every so many steps; null: 4 to 8 in a run, as 0.25 % of the time allows"
    )
    probe_tokens: int = Field(
        512,
        ge=0,
        description="tokens of the probe set: validation rows, or training rows where there are none; 0: none",
    )
    keep_probe: bool = Field(
        False,
        description="save the probe set's tokens as lens/probe.safetensors; otherwise only what is measured of them",
    )
    flush_seconds: float = Field(
        30.0, ge=0, description="captures go to disk at least so often; a kill loses what is younger"
    )
    scalars_megabytes: int = Field(
        64, ge=1, description="most room of scalars and spectra; beyond it, of old steps every second is dropped"
    )
    snapshots_megabytes: int = Field(
        256, ge=0, description="most room of snapshots; beyond it, every second is dropped"
    )
    report: bool = Field(True, description="write reports/lens.html when training ends")
