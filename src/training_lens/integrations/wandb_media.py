"""The rows, tables, histograms, figures and artifacts of a run in Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from training_lens.errors import TrainingLensError
from training_lens.integrations.record import RunRecord
from training_lens.integrations.tracker import (
    ANSWER_COLUMNS,
    Record,
    bin_edges,
    iterate_histograms,
    iterate_losses,
    list_answers,
)
from training_lens.utils.files import hash_file
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
WEIGHTS = "adapter_model.safetensors"
FINDING_COLUMNS = ("code", "severity", "title", "where", "measured", "threshold", "confidence", "action", "decide")
LOSSES = ("validation_loss", "base_validation_loss", "train_loss")


def build_row(records: Sequence[Record]) -> dict[str, Any]:
    """The row of one step: numbers, tables and histograms; losses in nats per supervised token."""
    import wandb

    values: dict[str, Any] = {}
    for record in records:
        values |= record.scalars
        if record.kind == "samples":
            model = "base" if record.values["base"] else "adapter"
            answers = ([step, model, *answer] for step, _, *answer in list_answers(record.values))
            values["samples"] = _build_table(["step", "model", *ANSWER_COLUMNS[2:]], answers)
        elif record.kind == "histograms":
            for kind, module, bins in iterate_histograms(record):
                values[f"{kind}/{module}"] = wandb.Histogram(np_histogram=(bins["counts"], bin_edges(bins).tolist()))
        elif record.kind in ("base", "validation"):
            model = "base" if record.kind == "base" else "adapter"
            rows = ([record.step, model, *loss] for loss in iterate_losses(record.values))
            values["validation_table"] = _build_table(["step", "model", "by", "name", "loss"], rows)
        elif record.verdict:
            values[f"{record.values['name']}/verdict"] = record.verdict
    return values


def build_lens_media(run: RunRecord) -> dict[str, Any]:
    """The lens's figures, findings and a table of modules; empty without captures. Takes seconds."""
    import plotly.graph_objects as go
    import wandb

    from training_lens.analysis.figures.catalogue import REPORT_FIGURES

    if run.analysis is None:
        return {}
    try:
        recording, analysis = run.analysis.recording, run.analysis.analyze()
        drawn: dict[str, go.Figure] = {d.name: d.draw(recording) for d in REPORT_FIGURES if recording.has(*d.needs)}
    except TrainingLensError as error:
        logger.warning("wandb: the results of the lens are not sent: %s", describe_error(error))
        return {}
    shown: dict[str, Any] = {f"lens/{name}": wandb.Plotly(figure) for name, figure in drawn.items()}
    findings = [[getattr(finding, column) for column in FINDING_COLUMNS] for finding in analysis.findings]
    shown["lens/findings"] = wandb.Table(columns=list(FINDING_COLUMNS), data=findings)
    if modules := analysis.values()["results"].get("weights", {}).get("modules"):
        shown["lens/modules"] = _build_table(list(modules[0]), (module.values() for module in modules))
    return shown


def build_artifacts(run: RunRecord, run_id: str) -> Iterator[Any]:
    """The adapter and the lens's report, if they exist, by reference to the run's files, not as copies."""
    import wandb

    if folder := run.intact_adapter:
        facts = {"base": run.config.model.id, "sha256": hash_file(folder / WEIGHTS), "run": run.run_id}
        losses = {name: run.summary.get(name) for name in LOSSES}
        adapter = wandb.Artifact(f"adapter-{run_id}", type="model", metadata=facts | losses)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            _add_file(adapter, file, file.relative_to(folder))
        yield adapter
    if (report := run.folder.reports / "lens.html").is_file():
        page = wandb.Artifact(f"lens-{run_id}", type="report")
        _add_file(page, report, Path(report.name))
        yield page


def _add_file(artifact: Any, file: Path, name: Path) -> None:
    artifact.add_file(str(file.absolute()), name=name.as_posix(), policy="immutable", skip_cache=True)


def _build_table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(values) for values in rows])
