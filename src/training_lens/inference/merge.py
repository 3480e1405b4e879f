"""An adapter merged into a folder of its own: written, checked in a fresh process, and kept only where it holds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from training_lens.config.schema import TrainingConfig
from training_lens.errors import AdapterError, ConfigurationError, MergeError
from training_lens.inference.exact import open_exact, run_of
from training_lens.inference.folders import REPORT, write_folder
from training_lens.inference.probes import Probes, Reference, config_rows, probes, reference, run_rows
from training_lens.inference.session import Session
from training_lens.inference.verification import Verification, verify
from training_lens.models.factory import locate
from training_lens.models.merging import check_foldable
from training_lens.models.stored import stored_precision
from training_lens.utils.devices import Precision
from training_lens.utils.files import sweep_temporaries, whole_folder, write_json
from training_lens.utils.runs import RunFolder


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

    Memory: the base in float32, once in this process, and then once in the one that checks.

    Args:
        on_written: called with the folder, still at a temporary name, before it is checked.

    Raises:
        ConfigurationError: the output is there already, or options that do not go together.
        AdapterError: the adapter is of another base, or of a kind that has no plain weights.
        MergeError: what was written does not compute what the adapter does; it is removed, and the report kept.
    """
    began = time.perf_counter()
    run = run_of(config)
    output = _output(options, run)
    session, known = open_exact(config, run, options.same_base)
    _check(session, options)
    dtype = stored_precision(session.config.model) if options.dtype == "auto" else options.dtype
    rows, origin = run_rows(run, session, _others(config)) if run else config_rows(session)
    given = probes(session, rows, origin)
    wanted = reference(session, given, options.scale)
    _refuse_idle(wanted, session)
    report = {"output": str(output), "base_known": known, **_head(session, options, dtype, given)}
    sweep_temporaries(output.parent, older_than_seconds=86_400)
    kept = run.reports / REPORT if run else output.with_name(f"{output.name}.{REPORT}")
    with (
        whole_folder(output, existing="replace" if options.force else "refuse") as folder,
        _refusal_reported(report, kept),
    ):
        job = _written(session, folder, options, dtype)
        del session  # the checking process loads the model again
        _free_memory()
        on_written(folder)
        found = verify(folder, given, wanted, dtype, report["quantization"], job)
        seconds = round(time.perf_counter() - began, 1)
        report |= {"verified": found.ok, **found.as_json(), "untied": job["untied"], "seconds": seconds}
        if not found.ok:
            raise MergeError(_refusal(found, dtype, kept))
        for path in (folder / REPORT, kept) if run else (folder / REPORT,):
            write_json(path, report)
    return Merged(output, report, found)


@contextmanager
def _refusal_reported(report: dict[str, Any], kept: Path) -> Iterator[None]:
    """A merge that is refused within the block leaves `report` in the file `kept`, and in it what is wrong."""
    try:
        yield
    except MergeError as error:
        write_json(kept, {**report, "verified": False, "error": str(error)})
        raise


def _output(options: MergeOptions, run: RunFolder | None) -> Path:
    """Where the result goes, once nothing is in its way."""
    if options.output:
        output = options.output.expanduser().absolute()
    elif run:
        output = run.delta if options.delta else run.merged
    else:
        raise ConfigurationError("a bare adapter has no run folder to merge into; give --output FOLDER.")
    if not output.exists():
        return output
    if not output.is_dir() or (any(output.iterdir()) and not (output / REPORT).is_file()):
        raise ConfigurationError(f"--output {output}: there is something that no merge wrote; give another folder.")
    if not options.force and any(output.iterdir()):
        raise ConfigurationError(f"{output} holds a merged model already. Give --force to replace it, or --output.")
    return output


def _others(config: TrainingConfig) -> list[str] | None:
    given = config.data.validation
    return [str(source) for source in given] if given and not isinstance(given[0], dict) else None


def _check(session: Session, options: MergeOptions) -> None:
    """Options that do not go together, or not with this adapter."""
    from huggingface_hub import split_torch_state_dict_into_shards

    if not (options.scale and abs(options.scale) < float("inf")):
        raise ConfigurationError(
            f"--scale {options.scale:g}: give a number other than 0, which would be the base itself."
        )
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=options.max_shard_size)
    except ValueError:
        raise ConfigurationError(
            f"--max-shard-size {options.max_shard_size}: give a number and a unit, such as 5GB or 500MB."
        ) from None
    if options.delta and session.config.model.quantization != "none":
        raise ConfigurationError(
            "--delta: the run trained on quantized weights, so the differences to the base's own would not be its "
            "update. Merge it whole."
        )
    check_foldable(session.model, options.scale)


def _refuse_idle(wanted: Reference, session: Session) -> None:
    if all(torch.equal(a, b) for a, b in zip(wanted.adapter, wanted.base, strict=True)):
        raise AdapterError(f"the adapter of {session.source} computes exactly what its base does: nothing to merge.")


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
        "rows": len(given.rows),
        "rows_from": given.origin,
    }


def _written(session: Session, folder: Path, options: MergeOptions, dtype: Precision) -> dict[str, Any]:
    """Write the folder, and say how the checking process is to load it; a whole model's folder says it all itself."""
    model, delta = session.config.model, options.delta
    untied = write_folder(
        session, folder, dtype, scale=options.scale, delta=delta, max_shard_size=options.max_shard_size
    )
    return {
        "base": locate(model) if delta else None,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "untied": untied,
        "device": str(session.device),
        "stop_ids": sorted(session.stop_ids),
        "pad_id": session.pad_id,
    }


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _refusal(found: Verification, dtype: Precision, kept: Path) -> str:
    failed = [f"{c.name}: {c.measured:.3g}, allowed {c.allowed:.3g}" for c in found.checks if not c.ok]
    advice = "" if dtype == "fp32" else f" A small update may be lost in {dtype}: try --dtype fp32."
    return (
        f"the merged model does not compute what the adapter does ({'; '.join(failed)}); it was removed. All measures "
        f"are in {kept}.{advice}"
    )
