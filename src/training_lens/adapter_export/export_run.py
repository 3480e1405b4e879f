"""Export an adapter into a folder of its own: write it, read it back, let another program compute, keep what passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from training_lens.adapter_export.export_plan import EXPORT, ExportOptions, plan_export
from training_lens.adapter_export.folded_lora import FoldedModule, fold_updates
from training_lens.adapter_export.peft_forms import write_peft, write_plain
from training_lens.adapter_export.update_checks import check_copies, check_updates
from training_lens.config.schema import TrainingConfig
from training_lens.errors import MergeError
from training_lens.inference.session import Session
from training_lens.merging.merge_run import decide_scale, keep_refusal, open_in_float32
from training_lens.merging.verification import MergeCheck, Probes, Verification, probe_adapter, verify_folder
from training_lens.merging.weight_update import load_updates
from training_lens.models.adapter_files import CONFIG, WEIGHTS
from training_lens.models.base_files import save_tokenizer
from training_lens.models.base_record import require_local_folder
from training_lens.models.location import locate_model
from training_lens.models.model_classes import public_class
from training_lens.models.quantization import loading_options
from training_lens.utils.devices import free_memory
from training_lens.utils.files import atomic_folder, write_json, write_text

NOUNS = {"peft": "an adapter in PEFT's format", "plain": "a plain LoRA"}


@dataclass(frozen=True)
class ExportResult:
    """An exported folder that passed its checks; `report` is the content of export.json."""

    output: Path
    report: dict[str, Any]
    verification: Verification


def export_adapter(
    config: TrainingConfig, options: ExportOptions, on_written: Callable[[Path], None] = lambda _folder: None
) -> ExportResult:
    """Write the adapter that `inference.adapter` names in another form, and check it.

    `on_written` is called with the folder, still at a temporary name, before it is checked. Memory: the base in
    float32, in one process at a time.

    Raises:
        ConfigurationError: the output is taken, or the options do not go together.
        AdapterError: the adapter belongs to another base, or the form cannot hold its update.
        MergeError: the result does not compute what the adapter does; it is removed, and the report kept.
        OutputError: another process filled the output in the meantime.
    """
    start = time.perf_counter()
    plan = plan_export(config, options)
    scale = decide_scale(options.scale, plan.run, "exports")
    session, known = open_in_float32(config, plan.run, options.same_base, "be exported")
    modules = [] if options.to == "peft" else fold_updates(session.model, scale, NOUNS[options.to])
    given, wanted = probe_adapter(config, plan.run, session, scale)
    report = {
        "output": str(plan.output),
        "form": options.to,
        "scale": scale,
        "base_known": known,
        **_report_settings(session, modules, given),
    }
    existing: Literal["replace", "refuse"] = "replace" if options.force else "refuse"
    with atomic_folder(plan.output, existing=existing) as folder, keep_refusal(report, plan.kept_report):
        job = _write_output(session, modules, folder, options.to, scale)
        del session  # the checks load the model again
        free_memory()
        on_written(folder)
        checks = _check_files(folder, plan.adapter, options.to, scale)
        report["checks"] = [check.as_json() for check in checks]
        _require_passed(checks, plan.kept_report)
        found = verify_folder(folder, given, wanted, "fp32", plan.base.quantization, job)
        found = replace(found, checks=(*checks, *found.checks))
        seconds = round(time.perf_counter() - start, 1)
        report |= {"verified": found.is_ok, **found.as_json(), "seconds": seconds}
        _require_passed(found.checks, plan.kept_report)
        write_json(folder / EXPORT.report, report | EXPORT.list_marks(folder))
        if plan.run:
            write_json(plan.kept_report, report)
    return ExportResult(plan.output, report, found)


def _report_settings(session: Session, modules: Sequence[FoldedModule], given: Probes) -> dict[str, Any]:
    """The part of the report besides the measurements."""
    model = session.config.model
    return {
        "adapter": str(session.adapter),
        "base": model.id,
        "revision": model.revision,
        "quantization": model.quantization,
        "modules": len(modules),
        "rank": max((module.rank for module in modules), default=None),
        "rows": len(given.rows),
        "rows_from": given.origin,
    }


def _write_output(
    session: Session, modules: Sequence[FoldedModule], folder: Path, form: str, scale: float
) -> dict[str, Any]:
    """Write all files but the report; returns how the checking process is to load the adapter on its base."""
    model = session.config.model
    job = {
        "is_adapter": True,
        "class": public_class(session.model),
        "base": locate_model(model),
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "quantization": _describe_quantization(session),
        "vocabulary": session.model.config.get_text_config().vocab_size,
        "device": str(session.device),
        "stop_ids": sorted(session.stop_ids),
        "pad_id": session.pad_id,
    }
    if form == "peft":
        write_peft(session, scale, folder)
    else:
        write_plain(session, modules, folder)
    save_tokenizer(session.tokenizer, folder, require_local_folder(model), model.trust_remote_code)
    write_text(folder / "README.md", _describe_folder(session, form, scale))
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes its files private to their owner, and a server is often another user
    return job


def _describe_quantization(session: Session) -> dict[str, Any] | None:
    options = loading_options(session.config.model, "fp32")
    return options["quantization_config"].to_dict() if options else None


def _describe_folder(session: Session, form: str, scale: float) -> str:
    base, name = locate_model(session.config.model), public_class(session.model)
    scaled = "" if scale == 1 else f", its update times {scale:g}"
    return (
        f"# Adapter\n\nThe adapter {session.adapter}{scaled}, as {NOUNS[form]}; checked, see {EXPORT.report}.\n\n"
        f"```python\nfrom peft import PeftModel\nfrom transformers import {name}\n\n"
        f'model = PeftModel.from_pretrained({name}.from_pretrained("{base}"), "path/to/this/folder")\n```\n'
    )


def _check_files(folder: Path, adapter: Path, form: str, scale: float) -> tuple[MergeCheck, ...]:
    """Read the written folder back, and compare it with the adapter's own files."""
    if form == "peft":
        return (check_copies(adapter, folder, (CONFIG, WEIGHTS) if scale == 1 else (CONFIG,)),)
    return check_updates(load_updates(adapter), scale, load_updates(folder))


def _require_passed(checks: Sequence[MergeCheck], kept: Path) -> None:
    """Raise a MergeError that names each check that failed."""
    failed = [
        f"{check.name}: {check.measured:.3g}, allowed {check.allowed:.3g}{f', in {check.where}' if check.where else ''}"
        for check in checks
        if not check.is_ok
    ]
    if failed:
        raise MergeError(
            f"what was exported is not what the adapter is ({'; '.join(failed)}); it was removed. All measures are in "
            f"{kept}."
        )
