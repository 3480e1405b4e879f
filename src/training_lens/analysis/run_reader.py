"""A run in Python: its numbers as data frames, its config, its findings, and its card in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
from training_lens.analysis.findings.diagnosis import diagnose
from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.logs import Log, read_our_log
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.config.run_config import read_run_config
from training_lens.config.schema import TrainingConfig
from training_lens.errors import CheckpointError, TrainingLensError
from training_lens.runs.checkpoint_format import list_checkpoint_steps
from training_lens.runs.housekeeping import is_in_place
from training_lens.runs.metrics_log import read_metrics, read_progress
from training_lens.runs.run_folder import LATEST, RunFolder
from training_lens.runs.run_lookup import find_run, find_run_folders
from training_lens.utils.names import expand_home

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

    from training_lens.analysis.explanations.explainer import Explainer
    from training_lens.analysis.run_card import RunComparison
    from training_lens.inference.session import Session

OUTPUTS = "outputs"
STEP_COLUMNS = ("epoch", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "seconds", "finite")
NULLABLE_TYPES = {"tokens": "Int64", "supervised_tokens": "Int64", "finite": "boolean"}  # kept beside empty cells
SAMPLE_COLUMNS = ("step", "base", "id", "prompt", "expected", "generated", "ended", "loops")
IN_A_MIRROR = (
    "a run in a mirror must be fetched first: Run(fetch_to_read(URL, 'outputs', finished=None).root), with "
    "from training_lens.integrations.remote_run import fetch_to_read."
)


class Run:
    """One finished, running or interrupted run, read from its folder: every property is up to date.

    A notebook shows it as a card with its numbers, losses and findings.

    Args:
        path_or_id: the run's folder, its id in any experiment, or `latest`.
        base_output_dir: the folder of all runs, to find an id.

    Raises:
        CheckpointError: the run does not exist, several have this id, or it is the URL of a run in a mirror. Its
            properties raise it where files of the run are missing or broken.

    Example:
        run = Run.latest()
        run.metrics["loss"].min()
        run.compare(Run("20261120T203605Z-5f3a"))
    """

    def __init__(self, path_or_id: Path | str, base_output_dir: Path | str = OUTPUTS) -> None:
        if "://" in str(path_or_id):
            raise CheckpointError(IN_A_MIRROR)
        self._base_output_dir = Path(base_output_dir).absolute()
        found = find_run(str(expand_home(path_or_id)), str(base_output_dir))
        self.folder = RunFolder(found.root.absolute())  # still found after a change of the working directory
        self._lens: CheckpointAnalyzer | None = None
        self._findings: tuple[Finding, ...] | None = None
        self._read_at: tuple[str, int] | None = None
        self._session: Session | None = None

    @classmethod
    def latest(cls, base_output_dir: Path | str = OUTPUTS, experiment: str | None = None) -> Run:
        """The run that was started last, whatever its status: of one experiment, or of all."""
        find_run_folders(str(base_output_dir), experiment)  # raises for an unknown experiment
        return cls(find_run(LATEST, str(base_output_dir), experiment).root)

    @property
    def run_id(self) -> str:
        return self.folder.run_id

    @property
    def status(self) -> str:
        """running, finished, failed, pruned or interrupted, see `RunFolder.status`."""
        return self.folder.status

    @property
    def config(self) -> TrainingConfig:
        """The resolved config of the run."""
        return read_run_config(self.folder)

    @property
    def summary(self) -> dict[str, Any]:
        """metadata/summary.json (see `TrainingSummary`); until the run has written it, its progress from the log."""
        status, written = self.status, dict(self.folder.read_metadata("summary.json"))
        progress = read_progress(self.folder) if written["status"] == "running" else {}
        return {**written, **progress, "status": status}

    @property
    def metrics(self) -> DataFrame:
        """logs/metrics.jsonl with one row per step and the index `step`.

        `epoch`; `loss` (nats per supervised token of this step's batch); `grad_norm` before clipping; `lr`; `tokens`
        without padding; `supervised_tokens`; `seconds`; `finite`. Validated steps also have `validation_loss`,
        and `validation_loss_NAME` for several domains or files, NaN elsewhere. Row 0 is the validation of the base.
        """
        import pandas

        rows: dict[int, dict[str, Any]] = {}
        for line in _read_lines(self.folder.metrics_file):
            row = rows.setdefault(line["step"], {})
            if line.get("kind") == "step":
                row.update({name: line.get(name) for name in STEP_COLUMNS})
            elif line.get("kind") in ("base", "validation"):
                parts = {**line.get("by_domain", {}), **line.get("by_file", {})}
                row["validation_loss"] = line.get("loss")
                row.update({f"validation_loss_{part}": loss for part, loss in parts.items()})
        validation = dict.fromkeys(name for row in rows.values() for name in row if name not in STEP_COLUMNS)
        index = pandas.Index(list(rows), name="step", dtype="int64")
        columns = {name: [row.get(name) for row in rows.values()] for name in (*STEP_COLUMNS, *validation)}
        kinds = {name: NULLABLE_TYPES.get(name, "float64") for name in columns}
        return pandas.DataFrame(columns, index=index).astype(kinds).sort_index()

    @property
    def samples(self) -> DataFrame:
        """logs/samples.jsonl with one row per answer: `step`, `base` (whether by the base model), `id`, `prompt`,
        `expected`, `generated`, `ended`, `loops`; empty if the run generates no samples (tracking.samples)."""
        import pandas

        samples = [
            {"step": line["step"], "base": line.get("base", False), **sample}
            for line in _read_lines(self.folder.samples_file)
            for sample in line.get("samples", ())
        ]
        return pandas.DataFrame(samples, columns=list(SAMPLE_COLUMNS))

    @property
    def lens(self) -> CheckpointAnalyzer:
        """The analyzer of the captures or checkpoints, see `open_recording`; up to date with the run."""
        read_at = (self.status, (self.folder.metadata / "summary.json").stat().st_mtime_ns)
        if self._lens is None or read_at != self._read_at or self.status == "running":
            self._lens, self._findings, self._read_at = CheckpointAnalyzer(self.folder.root), None, read_at
        return self._lens

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The current findings; takes about a second."""
        recording = self.lens.recording
        if self._findings is None:
            self._findings = diagnose(recording)
        return self._findings

    @property
    def explain(self) -> Explainer:
        """Explanations of the run's adapter: `run.explain.rows()`, like `training-lens explain`."""
        from training_lens.analysis.explanations.explainer import Explainer  # imports torch

        return Explainer(self.folder)

    @property
    def log(self) -> Log:
        """The logged losses as series, available without the lens."""
        return read_our_log(self.folder.metrics_file)

    def answer(
        self, prompts: str | Sequence[str], *, adapter: bool = True, domain: str | None = None, **settings: Any
    ) -> str | list[str]:
        """The adapter's answer to a prompt, or its answers to several prompts in order, like `training-lens infer`.

        The model is loaded for the first prompt and stays loaded.

        Args:
            prompts: a text, or a list of texts.
            adapter: False asks the base model, with the run's template.
            domain: a domain that the run was trained on.
            settings: keys of `inference.`, such as `max_new_tokens=64, temperature=0.7`.

        Raises:
            CheckpointError: the run has no finished adapter.
            ConfigurationError: a prompt is invalid, or a setting is unknown.
        """
        from training_lens.inference.generator import answer_texts  # imports torch and transformers
        from training_lens.inference.session import open_run

        self._session = self._session or open_run(self.folder)
        return answer_texts(self._session, prompts, InferenceSection(**settings), base=not adapter, domain=domain)

    def figure(self) -> Figure:
        """Training and validation loss with epochs, spikes and checkpoints, zoomable."""
        from training_lens.analysis.figures.run_figures import plot_loss

        return plot_loss(self.log, list_checkpoint_steps(self.folder.checkpoints))

    def compare(self, other: Run | Path | str) -> RunComparison:
        """Compare settings, numbers and losses with another run, or an argument of `Run`; ids are those beside this."""
        from training_lens.analysis.run_card import RunComparison

        outputs = self.folder.root.parents[3] if is_in_place(self.folder) else self._base_output_dir  # if it was moved
        there = other if isinstance(other, Run) else Run(other, outputs)
        return RunComparison(self.folder, there.folder)

    def __repr__(self) -> str:
        summary = self.summary
        losses = {"validation loss": summary.get("validation_loss"), "the base's": summary.get("base_validation_loss")}
        known = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
        return f"Run {self.run_id}: " + ", ".join([summary["status"], f"{summary['steps']} steps", *known])

    def _repr_html_(self) -> str:
        from training_lens.analysis.run_card import lens_parts, run_card

        try:
            lens = lens_parts(self.findings, self.lens.recording)
        except TrainingLensError as error:
            lens = [f"No findings: {error}"]
        return run_card(self.folder, self.summary, lens)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; none if it does not exist yet."""
    return read_metrics(path) if path.is_file() else []
