"""Export an adapter into a folder of its own: write it, read it back, let another program compute, keep what passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from training_lens.adapter_export.export_plan import EXPORT, ExportOptions, plan_export
from training_lens.adapter_export.folded_lora import fold_updates
from training_lens.adapter_export.gguf_export import GgufForm
from training_lens.adapter_export.mlx_form import MlxForm
from training_lens.adapter_export.peft_forms import PeftForm
from training_lens.config.schema import TrainingConfig
from training_lens.errors import MergeError
from training_lens.inference.session import Session
from training_lens.merging.merge_run import decide_scale, keep_refusal, open_in_float32
from training_lens.merging.verification import MergeCheck, Probes, Reference, Verification, probe_adapter
from training_lens.utils.devices import free_memory
from training_lens.utils.files import atomic_folder, write_json, write_text
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
NOUNS = {
    "peft": "an adapter in PEFT's format",
    "plain": "a plain LoRA",
    "gguf": "a GGUF adapter",
    "gguf-merged": "a merged GGUF model",
    "mlx": "an adapter for mlx-lm",
}


class ExportForm(Protocol):
    """One form: how it is written, read back, and computed with by a program that loads it."""

    def write(self, session: Session, folder: Path) -> None:
        """Write all files of the form; the session's model may be used up."""

    def describe_use(self) -> str:
        """How the folder is loaded, as Markdown."""

    def check_file(self, folder: Path) -> tuple[MergeCheck, ...]:
        """Compare what was written, read back, with the adapter's own files."""

    @property
    def reads_weights(self) -> bool:
        """Whether `check_file` compares the written weights, and not only the settings."""

    def compute(self, folder: Path, given: Probes, wanted: Reference) -> tuple[Verification | None, str]:
        """What another program computes with the folder; or None, with the reason and what would let it compute."""


@dataclass(frozen=True)
class ExportResult:
    """An exported folder that passed the checks that could run here; `report` is the content of export.json."""

    output: Path
    report: dict[str, Any]
    verification: Verification | None  # None: no program that loads this form is at hand


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
    given, wanted = probe_adapter(config, plan.run, session, scale)
    form, rank = _plan_form(session, options, scale, given)
    report = {
        "output": str(plan.output),
        "form": options.form,
        "scale": scale,
        "rank": rank,
        "base_known": known,
        **_report_settings(session, given),
        "weights_read_back": False,
        "answers_compared": False,
    }
    existing: Literal["replace", "refuse"] = "replace" if options.force else "refuse"
    with atomic_folder(plan.output, existing=existing) as folder, keep_refusal(report, plan.kept_report):
        _write_folder(session, form, folder, options.form, scale)
        del session  # the checks load the model again
        free_memory()
        on_written(folder)
        checks = form.check_file(folder)
        report["checks"] = [check.as_json() for check in checks]
        _require_passed(checks, plan.kept_report)
        report["weights_read_back"] = form.reads_weights
        found, why_not = form.compute(folder, given, wanted)
        if found:
            found = replace(found, checks=(*checks, *found.checks))
            report |= found.as_json()
            _require_passed(found.checks, plan.kept_report)
        is_compared = found is not None
        report |= {"verified": is_compared, "answers_compared": is_compared, "computed": is_compared}
        report |= {"not_computed": why_not, "seconds": round(time.perf_counter() - start, 1)}
        write_json(folder / EXPORT.report, report | EXPORT.list_marks(folder))
        if plan.run:
            write_json(plan.kept_report, report)
    return ExportResult(plan.output, report, found)


def _plan_form(session: Session, options: ExportOptions, scale: float, given: Probes) -> tuple[ExportForm, int | None]:
    """The form, and the rank of its low-rank updates if it has one for all.

    Raises:
        AdapterError: the form cannot hold this adapter.
    """
    if options.to == "peft":
        return PeftForm.plan(session, None, scale), None
    if options.merged:
        return GgufForm.plan(session, (), scale, options.dtype, given), None
    modules = fold_updates(session.model, scale, NOUNS[options.form])
    rank = max(module.rank for module in modules)
    if options.to == "plain":
        return PeftForm.plan(session, modules, scale), rank
    if options.to == "mlx":
        return MlxForm.plan(session, modules, scale), rank
    return GgufForm.plan(session, modules, scale, options.dtype, given), rank


def _report_settings(session: Session, given: Probes) -> dict[str, Any]:
    """The part of the report besides the measurements."""
    model = session.config.model
    return {
        "adapter": str(session.adapter),
        "base": model.id,
        "revision": model.revision,
        "quantization": model.quantization,
        "rows": len(given.rows),
        "rows_from": given.origin,
    }


def _write_folder(session: Session, form: ExportForm, folder: Path, name: str, scale: float) -> None:
    """Write all files but the report."""
    scaled = "" if scale == 1 else f", its update times {scale:g}"
    described = f"# Adapter\n\nThe adapter {session.adapter}{scaled}, as {NOUNS[name]}. What was checked, and by which "
    described += f"program, is in {EXPORT.report}.\n"
    form.write(session, folder)
    write_text(folder / "README.md", f"{described}\n{form.describe_use()}")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes its files private to their owner, and a server is often another user


def _require_passed(checks: Sequence[MergeCheck], kept: Path) -> None:
    """Raise a MergeError that names each check that failed."""
    failed = [
        f"{check.name}: {check.measured:.3g}, allowed {check.allowed:.3g}{f', in {check.where}' if check.where else ''}"
        for check in checks
        if not check.is_ok
    ]
    if failed:
        raise MergeError(
            f"the export does not match the adapter ({'; '.join(failed)}), so it was removed. All measurements are in "
            f"{kept}."
        )
