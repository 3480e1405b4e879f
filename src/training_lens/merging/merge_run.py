"""Merge an adapter into a folder of its own: write it, check it in a fresh process, and keep it only if it passes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, Literal

import torch

from training_lens import embedded
from training_lens.config.run_config import open_run_config
from training_lens.config.schema import ModelSection, TrainingConfig
from training_lens.errors import AdapterError, MergeError
from training_lens.inference.session import Session, open_run, open_session
from training_lens.merging.merge_plan import MERGE, MergeOptions, plan_merge
from training_lens.merging.merge_tensors import MergedModel, check_mergeable, merge_weights, save_delta, save_merged
from training_lens.merging.verification import Probes, Verification, probe_adapter, verify_folder
from training_lens.merging.weight_update import MergeOutput, check_weights
from training_lens.models.adapter_files import read_config, require_adapter, require_plain
from training_lens.models.adapters import count_parameters
from training_lens.models.base_files import COPIED, copy_files, has_newer_form, save_tokenizer, write_generation_config
from training_lens.models.base_record import check_base, require_local_folder, stored_precision
from training_lens.models.factory import build_skeleton, read_facts, resolve_seq_len
from training_lens.models.location import locate_model
from training_lens.models.model_classes import public_class
from training_lens.runs.run_folder import RunFolder, describe_scale
from training_lens.utils.devices import DTYPES, Precision, available_bytes, free_memory, get_device
from training_lens.utils.files import atomic_folder, write_json, write_text
from training_lens.utils.formatting import format_size
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home

logger = get_logger(__name__)
MEMORY_FACTOR = 1.25  # times the base's float32 weights: they, one shard that is written, and passes over few rows
# Keys of an adapter's configuration that say where its layers are, not what they compute.
OF_PLACES = ("layers_to_transform", "layers_pattern", "exclude_modules")


@dataclass(frozen=True)
class MergeResult:
    """A merged folder that passed its checks; `report` is the content of merge.json."""

    output: Path
    report: dict[str, Any]
    verification: Verification


def merge_adapter(
    config: TrainingConfig, options: MergeOptions, on_written: Callable[[Path], None] = lambda _folder: None
) -> MergeResult:
    """Merge the adapter that `inference.adapter` names into its base, and check it.

    `on_written` is called with the folder, still at a temporary name, before it is checked. Memory: the base in
    float32, in one process at a time: to merge, to recompute, and to check each weight.

    Raises:
        ConfigurationError: the output is taken, or the options do not go together.
        AdapterError: the adapter belongs to another base, or is of a kind that has no plain weights.
        MergeError: the result does not compute what the adapter does; it is removed, and the report kept.
        OutputError: another process filled the output in the meantime.
    """
    start = time.perf_counter()
    run, adapter, output = plan_merge(config, options)
    scale = decide_scale(options.scale, run, "merges")
    session, known = open_in_float32(config, run, options.same_base, "be merged")
    check_mergeable(session.model)
    _require_own_rows(session, options)
    base = session.config.model
    dtype = stored_precision(base) if options.dtype == "auto" else options.dtype
    given, wanted = probe_adapter(config, run, session, scale)
    report = {
        "output": str(output),
        "scale": scale,
        "base_known": known,
        **_report_settings(session, options, dtype, given),
    }
    kept = run.reports / MERGE.report if run else output.with_name(f"{output.name}.{MERGE.report}")
    existing: Literal["replace", "refuse"] = "replace" if options.force else "refuse"
    with atomic_folder(output, existing=existing) as folder, keep_refusal(report, kept):
        job = _write_output(session, folder, replace(options, scale=scale), dtype)
        tokens = tuple(session.config.data.new_tokens)
        written = MergeOutput(folder, base, adapter, session.device, dtype, scale, options.delta, tokens)
        del session  # the checks load the model again, one after the other
        free_memory()
        on_written(folder)
        found = verify_folder(folder, given, wanted, dtype, report["quantization"], job)
        found = replace(found, checks=(*check_weights(written), *found.checks))
        seconds = round(time.perf_counter() - start, 1)
        report |= {"verified": found.is_ok, **found.as_json(), "untied": job["untied"], "seconds": seconds}
        if not found.is_ok:
            raise MergeError(_explain_refusal(found, dtype, kept))
        write_json(folder / MERGE.report, report | MERGE.list_marks(folder))
        if run:
            write_json(kept, report)
    return MergeResult(output, report, found)


def _require_own_rows(session: Session, options: MergeOptions) -> None:
    """Refuse the difference to a base that has other rows here than in its files."""
    rows, own = session.model.config.get_text_config().vocab_size, read_facts(session.config.model).vocabulary
    if options.delta and (rows != own or session.config.data.new_tokens):
        raise AdapterError(
            "--delta: embedding and output head got rows for tokens that the base lacks, so a difference to its own "
            "weights would not be the model. Merge it whole."
        )


def decide_scale(asked: float | None, run: RunFolder | None, doing: str) -> float:
    """What the update is multiplied by: as asked for, or as was chosen for the run, which is logged.

    Args:
        doing: what the command does with the adapter, for the log: 'merges'.
    """
    if asked is None and run and run.adapter_scale != 1:
        logger.info("%s; --scale 1 %s it as trained", describe_scale(run), doing)
        return run.adapter_scale
    return 1.0 if asked is None else asked


@contextmanager
def keep_refusal(report: dict[str, Any], kept: Path) -> Iterator[None]:
    """Write `report` with the error to the file `kept` if the output is refused within the block."""
    try:
        yield
    except MergeError as error:
        write_json(kept, {**report, "verified": False, "error": str(error)})
        raise


def open_in_float32(config: TrainingConfig, run: RunFolder | None, same_base: bool, doing: str) -> tuple[Session, bool]:
    """The adapter on its base, in float32; and whether the base's weights are known to be those that it trained on.

    Args:
        doing: what adapters of other kinds cannot do, for the message: 'be merged'.
    """
    if run:
        trained = open_run_config(run, config.explicit_values(), "model.trust_remote_code").model
        device = choose_device(trained, config.model.device)
        session = open_run(run, device, "fp32", config.explicit_values(), run.adapter)
        return session, check_base(run.base_record, session.config.model)
    folder = expand_home(config.inference.adapter)
    settings = read_config(require_adapter(folder))
    require_plain(settings, folder, "inference.adapter", doing, also=OF_PLACES)
    known = check_base(RunFolder(folder.resolve().parents[1]).base_record, config.model)
    if not known and not same_base:
        _check_base_name(folder, settings.get("base_model_name_or_path"), config.model)
    seq_len = resolve_seq_len(config.model, read_facts(config.model))
    device = choose_device(config.model, config.model.device)
    exact = config.replace_keys(
        model={"dtype": "fp32", "seq_len": seq_len, "device": device}, training={"precision": "fp32"}
    )
    return open_session(exact), known


def choose_device(model: ModelSection, asked: str) -> str:
    """The device to compute on: the one asked for; with `auto` the run's, or the CPU if the base does not fit there.

    Logs how much memory that takes, and warns if that is not free.
    """
    device = get_device(model.device if asked == "auto" else asked)
    needed = MEMORY_FACTOR * torch.float32.itemsize * count_parameters(build_skeleton(model)).total
    free = available_bytes(device)
    is_short = free is not None and free < needed
    if is_short and asked == "auto" and device.type != "cpu":
        logger.info("computing on the CPU: %s has %s of memory free", device, format_size(free or 0))
        device, free = torch.device("cpu"), available_bytes(torch.device("cpu"))
        is_short = free is not None and free < needed
    level, rest = (WARNING, f", and {format_size(free or 0)} are free") if is_short else (INFO, "")
    logger.log(level, "the base in float32 takes about %s of memory on %s%s", format_size(needed), device, rest)
    return str(device)


def _check_base_name(folder: Path, named: str | None, model: ModelSection) -> None:
    """Refuse a base that is neither called nor stored as the adapter's configuration says."""
    here = locate_model(model)
    first, second = Path(embedded.resolve_name(named or here)), Path(here)
    if named in (None, "", here, model.id) or (first.exists() and second.exists() and first.samefile(second)):
        return
    raise AdapterError(
        f"inference.adapter: {folder} was trained on '{named}', and model.id is '{model.id}'. Give model.id={named}; "
        "or --same-base, where they are one model under two names."
    )


def _report_settings(session: Session, options: MergeOptions, dtype: Precision, given: Probes) -> dict[str, Any]:
    """The part of the report besides the measurements."""
    model = session.config.model
    return {
        "adapter": str(session.adapter),
        "base": model.id,
        "revision": model.revision,
        "kind": "delta" if options.delta else "merged",
        "dtype": dtype,
        "quantization": model.quantization,
        "newer_form": has_newer_form(require_local_folder(model)),
        "rows": len(given.rows),
        "rows_from": given.origin,
    }


def _write_output(session: Session, folder: Path, options: MergeOptions, dtype: Precision) -> dict[str, Any]:
    """Write the folder; returns how the checking process is to load it."""
    model, name = session.config.model, public_class(session.model)
    return {
        "class": name,
        "base": locate_model(model) if options.delta else None,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "untied": _write_files(session, folder, options, dtype),
        "device": str(session.device),
        "stop_ids": sorted(session.stop_ids),
        "pad_id": session.pad_id,
    }


def _write_files(session: Session, folder: Path, options: MergeOptions, dtype: Precision) -> bool:
    """Write all files but the report; whether tied weights became untied. The session's model is used up.

    With the option auto `dtype` is the most common one of the base's files, and each weight of a whole model keeps its
    own.
    """
    scale = 1.0 if options.scale is None else options.scale
    merged = merge_weights(session.model, scale, delta=options.delta)
    _require_space(merged, options.delta, folder, DTYPES[dtype])
    if options.delta:
        save_delta(merged, folder, DTYPES[dtype], options.max_shard_size)
    else:  # with the base's own config, tokenizer and chat template, and the session's stop tokens
        base = session.config.model
        own, trusted = require_local_folder(base), base.trust_remote_code
        save_merged(merged, base, folder, None if options.dtype == "auto" else dtype, options.max_shard_size)
        save_tokenizer(session.tokenizer, folder, own, trusted)
        write_generation_config(own, folder, merged.model, session.stop_ids, session.pad_id)
        copy_files(own, folder, [*COPIED, "*.py"] if trusted else COPIED)
    scaled = "" if scale == 1 else f", its update times {scale:g}"
    what = f"The adapter {session.adapter}{scaled}, merged into {session.config.model.id}; weights in {dtype}."
    if options.delta:
        readme = _delta_readme(session, what, bool(merged.untied))
    else:
        parted = " Embedding and head, one weight in the base, are two here." if merged.untied else ""
        readme = f"# Merged model\n\n{what}{parted} Checked against the adapter: see {MERGE.report}.\n"
    write_text(folder / "README.md", readme)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes its files private to their owner, and a server is often another user
    return bool(merged.untied)


def _require_space(merged: MergedModel, delta: bool, folder: Path, dtype: torch.dtype) -> None:
    model = merged.model
    written = [model.get_parameter(name) for name in merged.changed] if delta else list(model.parameters())
    needed, free = sum(p.numel() for p in written) * dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise MergeError(
            f"the result takes {format_size(needed)}, and {folder.parent} has {format_size(free)} left. Free some "
            "space, or give --output on another disk."
        )


def _delta_readme(session: Session, description: str, untied: bool) -> str:
    untie = "head = model.get_output_embeddings()\nhead.weight = torch.nn.Parameter(head.weight.clone())\n"
    base, name = locate_model(session.config.model), public_class(session.model)
    return (
        f"# Difference to a base model\n\n{description} Add this to the base's weights; checked, see "
        f"{MERGE.report}.\n\n"
        "```python\nimport glob, torch\nfrom safetensors.torch import load_file\n"
        f"from transformers import {name}\n\n"
        f'model = {name}.from_pretrained("{base}", dtype=torch.float32).requires_grad_(False)\n'
        f'{untie if untied else ""}for file in glob.glob("delta*.safetensors"):\n'
        "    for name, difference in load_file(file).items():\n"
        "        model.get_parameter(name).add_(difference.float())\n```\n"
    )


def _explain_refusal(found: Verification, dtype: Precision, kept: Path) -> str:
    failed = [
        f"{c.name}: {c.measured:.3g}, allowed {c.allowed:.3g}{f', in {c.where}' if c.where else ''}"
        for c in found.checks
        if not c.is_ok
    ]
    rounded = dtype != "fp32" and all(c.is_ok for c in found.checks[:2])
    advice = f" Each weight is rightly rounded, and {dtype} is too coarse for this update: try --dtype fp32."
    return (
        f"what was merged is not what the adapter is ({'; '.join(failed)}); it was removed. All measures "
        f"are in {kept}.{advice if rounded else ''}"
    )
