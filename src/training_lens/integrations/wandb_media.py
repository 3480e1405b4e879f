"""The rows, tables, histograms, figures and artifacts of a run in Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training_lens.errors import TrainingLensError
from training_lens.integrations.record import RunRecord
from training_lens.integrations.tracker import Record, bin_edges, iterate_losses
from training_lens.utils.files import hash_file
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
WEIGHTS = "adapter_model.safetensors"
SAMPLE_COLUMNS = ("id", "prompt", "expected", "generated")
FINDING_COLUMNS = ("code", "severity", "title", "where", "measured", "threshold", "confidence", "action", "decide")
LOSSES = ("validation_loss", "base_validation_loss", "train_loss")


def build_row(records: Sequence[Record]) -> dict[str, Any]:
    """The row of one step: numbers, tables and histograms."""
    values: dict[str, Any] = {}
    for record in records:
        values |= record.scalars
        if record.kind == "samples":
            values["samples"] = _sample_table(record)
        elif record.kind == "histograms":
            values |= dict(_build_histograms(record.values["histograms"]))
        elif record.kind in ("base", "validation"):
            values["validation_table"] = _loss_table(record)
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
        adapter = wandb.Artifact(f"adapter-{run_id}", type="model", metadata=_adapter_facts(run))
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            _add_file(adapter, file, file.relative_to(folder))
        yield adapter
    if (report := run.folder.reports / "lens.html").is_file():
        page = wandb.Artifact(f"lens-{run_id}", type="report")
        _add_file(page, report, Path(report.name))
        yield page


def _add_file(artifact: Any, file: Path, name: Path) -> None:
    artifact.add_file(str(file.absolute()), name=name.as_posix(), policy="immutable", skip_cache=True)


def _adapter_facts(run: RunRecord) -> dict[str, Any]:
    losses = {name: run.summary.get(name) for name in LOSSES}
    return {"base": run.config.model.id, "sha256": hash_file(run.folder.adapter / WEIGHTS), "run": run.run_id} | losses


def _sample_table(record: Record) -> Any:
    model = "base" if record.values["base"] else "adapter"
    rows = [[record.step, model, *(sample[name] for name in SAMPLE_COLUMNS)] for sample in record.values["samples"]]
    return _build_table(["step", "model", *SAMPLE_COLUMNS], rows)


def _loss_table(record: Record) -> Any:
    """Rows of the losses over all rows, each domain and each file, in nats per supervised token."""
    model = "base" if record.kind == "base" else "adapter"
    rows = ([record.step, model, *row] for row in iterate_losses(record.values))
    return _build_table(["step", "model", "by", "name", "loss"], rows)


def _build_table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(values) for values in rows])


def _build_histograms(kinds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Any]]:
    """Names such as `weights/MODULE.A`, and histograms of equal bins."""
    import wandb

    for kind, modules in kinds.items():
        for name, found in modules.items():
            edges = bin_edges(found).tolist()
            yield f"{kind}/{name}", wandb.Histogram(np_histogram=(found["counts"], edges))
