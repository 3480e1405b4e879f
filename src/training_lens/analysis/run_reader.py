"""A run in Python: its numbers as data frames, its config, what the lens says of it, and how a notebook shows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
from training_lens.analysis.frames import metrics_frame, samples_frame
from training_lens.analysis.logs import Log, read_our_log
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.config.run_config import read_run_config
from training_lens.config.schema import TrainingConfig
from training_lens.errors import CheckpointError, TrainingLensError
from training_lens.runs.checkpoint_format import list_checkpoint_steps
from training_lens.runs.housekeeping import is_in_place
from training_lens.runs.metrics_log import read_progress
from training_lens.runs.run_folder import LATEST, RunFolder
from training_lens.runs.run_lookup import find_run, find_run_folders
from training_lens.utils.names import expand_home

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

    from training_lens.analysis.findings import Finding
    from training_lens.analysis.run_comparison import RunComparison
    from training_lens.inference.session import Session

OUTPUTS = "outputs"
IN_A_MIRROR = (
    "a run in a mirror is brought here first: Run(fetch_to_read(URL, 'outputs', finished=None).root), with "
    "from training_lens.integrations.remote_run import fetch_to_read."
)


class Run:
    """One run, finished, running or broken off, read from its folder: every property says what is there by now.

    In a notebook it shows itself: its numbers, its losses, and what the lens found so far.

    Args:
        path_or_id: the run's folder, its id in any experiment, or `latest`.
        base_output_dir: where the runs are, for an id.

    Raises:
        CheckpointError: there is no such run, the id is that of several, or it is the URL of a run in a mirror.

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
        self.folder = RunFolder(found.root.absolute())  # it is found also after a change of the directory
        self._lens: CheckpointAnalyzer | None = None
        self._findings: tuple[Finding, ...] | None = None
        self._read_at: tuple[str, int] | None = None
        self._session: Session | None = None

    @classmethod
    def latest(cls, base_output_dir: Path | str = OUTPUTS, experiment: str | None = None) -> Run:
        """The run that was started last, whatever became of it.

        Args:
            experiment: of this one; None: of all.

        Raises:
            CheckpointError: there is no run yet.
            ConfigurationError: there is no such experiment.
        """
        find_run_folders(str(base_output_dir), experiment)  # refuses an experiment that is not there
        return cls(find_run(LATEST, str(base_output_dir), experiment).root)

    @property
    def run_id(self) -> str:
        return self.folder.run_id

    @property
    def status(self) -> str:
        """running, finished, failed, pruned or interrupted.

        Raises:
            CheckpointError: metadata/summary.json is missing or broken; so for `summary` and what is read of it.
        """
        return self.folder.status

    @property
    def config(self) -> TrainingConfig:
        """The resolved config that it was started with.

        Raises:
            CheckpointError: metadata/config.json is missing or broken.
        """
        return read_run_config(self.folder)

    @property
    def summary(self) -> dict[str, Any]:
        """metadata/summary.json (see `TrainingSummary`); until the run has written it, what its journal tells."""
        status, written = self.status, dict(self.folder.read_metadata("summary.json"))
        told = read_progress(self.folder) if written["status"] == "running" else {}
        return {**written, **told, "status": status}

    @property
    def metrics(self) -> DataFrame:
        """logs/metrics.jsonl, a row a step, with the index `step`.

        `epoch`; `loss` (nats per supervised token of this step's batch); `grad_norm` before clipping; `lr`; `tokens`
        without padding; `supervised_tokens`; `seconds`; `finite`. After a validation also `validation_loss`, and of
        several domains or files `validation_loss_NAME`; other rows have NaN there. Row 0 is the validation of the base.
        """
        return metrics_frame(self.folder.metrics_file)

    @property
    def samples(self) -> DataFrame:
        """logs/samples.jsonl, a row an answer: `step`, `base` (the base model's), `id`, `prompt`, `expected`,
        `generated`; without rows where the run answers no samples (tracking.samples)."""
        return samples_frame(self.folder.samples_file)

    @property
    def lens(self) -> CheckpointAnalyzer:
        """What was captured, or else the checkpoints; opened again when the run has gone on.

        Raises:
            LensError: there is neither, perhaps not yet.
        """
        read_at = (self.status, (self.folder.metadata / "summary.json").stat().st_mtime_ns)
        if self._lens is None or read_at != self._read_at or self.status == "running":
            self._lens, self._findings, self._read_at = CheckpointAnalyzer(self.folder.root), None, read_at
        return self._lens

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the lens finds wrong or fine by now; takes a second or so. Raises as `lens` does."""
        from training_lens.analysis.findings import diagnose

        recording = self.lens.recording
        if self._findings is None:
            self._findings = diagnose(recording)
        return self._findings

    @property
    def log(self) -> Log:
        """The losses of its journal as series: what figures are drawn of, also where the lens was off."""
        return read_our_log(self.folder.metrics_file)

    def answer(
        self, prompts: str | Sequence[str], *, adapter: bool = True, domain: str | None = None, **settings: Any
    ) -> str | list[str]:
        """The adapter's answer to a prompt, or its answers to several in their order, as `training-lens infer` gives.

        The model is loaded with the first question, and stays.

        Args:
            prompts: a text, or a list of texts.
            adapter: false asks the base, with the run's template.
            domain: one that the run was trained on.
            settings: keys of `inference.`, such as `max_new_tokens=64, temperature=0.7`.

        Raises:
            CheckpointError: the run has no finished adapter.
            ConfigurationError: a prompt that cannot be asked, or a setting that there is not.
        """
        from training_lens.inference.asking import answer_texts  # torch and transformers are for this alone
        from training_lens.inference.session import open_run

        self._session = self._session or open_run(self.folder)
        return answer_texts(self._session, prompts, InferenceSection(**settings), base=not adapter, domain=domain)

    def figure(self) -> Figure:
        """Training and validation loss, with epochs, spikes and checkpoints, to zoom into."""
        from training_lens.analysis.figures.run_figures import plot_loss

        return plot_loss(self.log, list_checkpoint_steps(self.folder.checkpoints))

    def compare(self, other: Run | Path | str) -> RunComparison:
        """The two side by side: their settings, numbers and losses.

        Args:
            other: a run, or what `Run` takes; an id is looked for where this run is.

        Raises:
            CheckpointError: there is no such run, or the metadata of one of the two are missing or broken.
        """
        from training_lens.analysis.run_comparison import RunComparison

        there = other if isinstance(other, Run) else Run(other, self._outputs_folder())
        return RunComparison(self.folder, there.folder)

    def _outputs_folder(self) -> Path:
        """The folder of outputs that the run is in; of a run that was moved out of one, that which was given."""
        return self.folder.root.parents[3] if is_in_place(self.folder) else self._base_output_dir

    def __repr__(self) -> str:
        told = self.summary
        losses = {"validation loss": told.get("validation_loss"), "the base's": told.get("base_validation_loss")}
        known = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
        return f"Run {self.run_id}: " + ", ".join([told["status"], f"{told['steps']} steps", *known])

    def _repr_html_(self) -> str:
        from training_lens.analysis.run_card import lens_parts, run_card

        try:
            lens = lens_parts(self.findings, self.lens.recording)
        except TrainingLensError as error:
            lens = [f"No findings: {error}"]
        return run_card(self.folder, self.summary, lens)
