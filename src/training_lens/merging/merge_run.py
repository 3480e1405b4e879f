"""An adapter merged into a folder of its own: written, checked in a fresh process, and kept only where it holds."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from training_lens.config.schema import ModelSection, TrainingConfig
from training_lens.errors import AdapterError, ConfigurationError, MergeError
from training_lens.inference.session import Session
from training_lens.merging.merge_tensors import check_foldable
from training_lens.merging.merged_folder import REPORT, write_folder
from training_lens.merging.merged_weights import Written, check_weights
from training_lens.merging.output_paths import check_place, marks
from training_lens.merging.probe_prompts import Probes, Reference, config_rows, probes, reference, run_rows
from training_lens.merging.run_base import adapter_of, open_exact, run_of
from training_lens.merging.verification import Verification, verify
from training_lens.models.base_files import has_newer_form
from training_lens.models.classes import public_class
from training_lens.models.location import locate
from training_lens.models.stored import require_local_folder, stored_precision
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.devices import Precision, free_memory
from training_lens.utils.files import atomic_folder, sweep_temporaries, write_json
from training_lens.utils.names import expand_home


@dataclass(frozen=True)
class MergeOptions:
    """What is written, and where.

    Attributes:
        output: the folder; None is artifacts/merged (with `delta`, artifacts/delta) of the run.
        dtype: of the written weights; auto is that of the base's files.
        scale: multiplies the adapter's update; 1 is as trained.
        delta: write the differences of the changed weights alone.
        max_shard_size: of a file, such as '5GB'.
        force: replace an output that an earlier merge wrote.
        same_base: take `model.id` for the base that a bare adapter names otherwise.
    """

    output: Path | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    scale: float = 1.0
    delta: bool = False
    max_shard_size: str = "5GB"
    force: bool = False
    same_base: bool = False


@dataclass(frozen=True)
class Merged:
    """A folder that holds what it should: `report` is what merge.json says."""

    output: Path
    report: dict[str, Any]
    verification: Verification


def merge(
    config: TrainingConfig, options: MergeOptions, on_written: Callable[[Path], None] = lambda _folder: None
) -> Merged:
    """Merge the adapter that `inference.adapter` names into its base, and check it.

    Memory: the base in float32, at one time in one process: to merge, to compute anew, and to check each weight.

    Args:
        on_written: called with the folder, still at a temporary name, before it is checked.

    Raises:
        ConfigurationError: something is in the output's way, or options that do not go together.
        AdapterError: the adapter is of another base, or of a kind that has no plain weights.
        MergeError: what was written is not what the adapter is; it is removed, and the report kept.
        OutputError: another process filled the output meanwhile.
    """
    began = time.perf_counter()
    run = run_of(config)
    adapter, base = adapter_of(config, run)
    _check(options, base)
    output = _make_room(options, run, adapter, base)
    session, known = open_exact(config, run, options.same_base)
    check_foldable(session.model, options.scale)
    dtype = stored_precision(session.config.model) if options.dtype == "auto" else options.dtype
    given, wanted = _computed(config, run, session, options.scale)
    report = {"output": str(output), "base_known": known, **_head(session, options, dtype, given)}
    kept = run.reports / REPORT if run else output.with_name(f"{output.name}.{REPORT}")
    existing: Literal["replace", "refuse"] = "replace" if options.force else "refuse"
    with atomic_folder(output, existing=existing) as folder, _refusal_reported(report, kept):
        job = _written(session, folder, options, dtype)
        written = Written(folder, session.config.model, adapter, session.device, dtype, options.scale, options.delta)
        del session  # the checks load the model again, one after the other
        free_memory()
        on_written(folder)
        found = verify(folder, given, wanted, dtype, report["quantization"], job)
        found = replace(found, checks=(*check_weights(written), *found.checks))
        seconds = round(time.perf_counter() - began, 1)
        report |= {"verified": found.ok, **found.as_json(), "untied": job["untied"], "seconds": seconds}
        if not found.ok:
            raise MergeError(_refusal(found, dtype, kept))
        write_json(folder / REPORT, report | marks(folder))
        if run:
            write_json(kept, report)
    return Merged(output, report, found)


@contextmanager
def _refusal_reported(report: dict[str, Any], kept: Path) -> Iterator[None]:
    """A merge that is refused within the block leaves `report` in the file `kept`, and in it what is wrong."""
    try:
        yield
    except MergeError as error:
        write_json(kept, {**report, "verified": False, "error": str(error)})
        raise


def _make_room(options: MergeOptions, run: RunFolder | None, adapter: Path, base: ModelSection) -> Path:
    """Where the result goes (of a link, what it leads to), once nothing is in its way."""
    if not options.output and run is None:
        raise ConfigurationError("a bare adapter has no run folder to merge into; give --output FOLDER.")
    own = (run.weight_delta if options.delta else run.merged_model) if run else Path()
    output = (expand_home(options.output) if options.output else own).resolve()
    check_place(output, run, adapter, base, options.force)
    if not options.output:  # the folder around it is the run's: what killed merges left there may go
        sweep_temporaries(output.parent, older_than_seconds=86_400)
    return output


def _computed(
    config: TrainingConfig, run: RunFolder | None, session: Session, scale: float
) -> tuple[Probes, Reference]:
    """Rows to check on, and what the adapter computes for them."""
    rows, origin = run_rows(run, session, _others(config)) if run else config_rows(session)
    given = probes(session, rows, origin)
    wanted = reference(session, given, scale)
    if all(torch.equal(a, b) for a, b in zip(wanted.adapter, wanted.base, strict=True)):
        raise AdapterError(f"the adapter of {session.source} computes exactly what its base does: nothing to merge.")
    return given, wanted


def _others(config: TrainingConfig) -> list[str] | None:
    given = config.data.validation
    return [str(source) for source in given] if given and not isinstance(given[0], dict) else None


def _check(options: MergeOptions, base: ModelSection) -> None:
    """Refuse options that make no sense, or not with this base."""
    if not (options.scale and math.isfinite(options.scale)):
        raise ConfigurationError(
            f"--scale {options.scale:g}: give a number other than 0, which would be the base itself."
        )
    size = re.fullmatch(r"(\d+) ?[KMGT]B", options.max_shard_size.strip(), re.IGNORECASE)
    if size is None or int(size[1]) == 0:
        raise ConfigurationError(
            f"--max-shard-size {options.max_shard_size}: give a whole number above 0 and a unit, such as 5GB or 500MB."
        )
    if options.delta and base.quantization != "none":
        raise ConfigurationError(
            "--delta: the run trained on quantized weights, so the differences to the base's own would not be its "
            "update. Merge it whole."
        )


def _head(session: Session, options: MergeOptions, dtype: Precision, given: Probes) -> dict[str, Any]:
    """What the report says besides the measures."""
    model = session.config.model
    return {
        "adapter": str(session.adapter),
        "base": model.id,
        "revision": model.revision,
        "kind": "delta" if options.delta else "merged",
        "dtype": dtype,
        "scale": options.scale,
        "quantization": model.quantization,
        "newer_form": has_newer_form(require_local_folder(model)),
        "rows": len(given.rows),
        "rows_from": given.origin,
    }


def _written(session: Session, folder: Path, options: MergeOptions, dtype: Precision) -> dict[str, Any]:
    """Write the folder, and say how the checking process is to load it; a whole model's folder says it all itself."""
    model, delta, name = session.config.model, options.delta, public_class(session.model)
    untied = write_folder(
        session,
        folder,
        dtype,
        keeps_types=options.dtype == "auto",
        scale=options.scale,
        delta=delta,
        max_shard_size=options.max_shard_size,
    )
    return {
        "class": name,
        "base": locate(model) if delta else None,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "untied": untied,
        "device": str(session.device),
        "stop_ids": sorted(session.stop_ids),
        "pad_id": session.pad_id,
    }


def _refusal(found: Verification, dtype: Precision, kept: Path) -> str:
    failed = [
        f"{c.name}: {c.measured:.3g}, allowed {c.allowed:.3g}{f', in {c.where}' if c.where else ''}"
        for c in found.checks
        if not c.ok
    ]
    rounded = dtype != "fp32" and all(c.ok for c in found.checks[:2])
    advice = f" Each weight is rightly rounded, and {dtype} is too coarse for this update: try --dtype fp32."
    return (
        f"what was merged is not what the adapter is ({'; '.join(failed)}); it was removed. All measures "
        f"are in {kept}.{advice if rounded else ''}"
    )
