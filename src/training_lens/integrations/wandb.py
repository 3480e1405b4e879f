"""Weights & Biases, online or offline, with its own client: one W&B run per run, under one id."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any

from training_lens.errors import CheckpointError, IntegrationError, TrainingLensError
from training_lens.integrations.record import RunRecord
from training_lens.integrations.tracker import (
    ANSWER_COLUMNS,
    BATCH,
    Record,
    Tracker,
    bin_edges,
    iterate_histograms,
    iterate_losses,
    list_answers,
    require_packages,
)
from training_lens.runs.journal import JournalEntry
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import PROCESS
from training_lens.utils.files import hash_file
from training_lens.utils.formatting import describe_error, strip_full_stop
from training_lens.utils.logging import get_logger

INIT_SECONDS = 30.0  # for the first answer of the server
LEAST_FINISH_SECONDS = 600.0  # that W&B may take at the end, when an adapter of gigabytes may be sent
REFUSED = re.compile(r"error 40[13]\b")  # HTTP status: the key is wrong or has no write permission
NO_METADATA = "http://127.0.0.1:9"  # instead of a cloud's metadata server, which wandb-core would ask
OWN_RUN_KEYS = ("run_dir",)  # of the summary: a path of this machine
logger = get_logger(__name__)
WEIGHTS = "adapter_model.safetensors"
FINDING_COLUMNS = ("code", "severity", "title", "where", "measured", "threshold", "confidence", "action", "decide")
LOSSES = ("validation_loss", "base_validation_loss", "train_loss")


class WandBIntegration(Tracker):
    """Sends a run to Weights & Biases, or writes it as a W&B offline run.

    Rows count as sent once W&B has finished the run: if a client dies earlier, the next one starts where the last
    finished one ended. Rows have the training step as W&B's step, so that a server drops those that it has.
    """

    name = "wandb"

    def __init__(self, run: RunRecord) -> None:
        self.settings = run.config.tracking.wandb
        super().__init__(run)
        self._run: Any = None  # W&B's run, from the first record on
        self._begun = False  # whether the client has a process
        self._held: list[tuple[str, JournalEntry]] = []
        self._ended = False
        self._stopped = Event()

    @property
    def destination(self) -> str:
        return f"{self.settings.mode} {self.settings.entity or ''} {self.settings.project}"

    @property
    def wandb_id(self) -> str:
        """The W&B id of the run: the same after a resume, and on another machine."""
        return build_wandb_id(self.run.experiment, self.run.run_id)

    def require(self) -> None:
        require_packages("wandb", "wandb")
        if self.settings.mode != "online":
            return
        import wandb
        from wandb.sdk.lib.wbauth import authenticate_session

        host = wandb.setup().settings.base_url
        try:
            key = authenticate_session(host=host, source="", prompt=False, update_session=False)
        except wandb.errors.Error as error:
            raise IntegrationError(f"W&B: {describe_error(error)}") from error
        if key is None:
            raise IntegrationError(
                f"there is no key for {host}: set WANDB_API_KEY, run `wandb login`, or give "
                "tracking.wandb.mode=offline."
            )

    def deliver(self, ended: bool) -> None:
        self._ended = ended
        super().deliver(ended)

    def log(self, records: Sequence[Record]) -> None:
        """Log one row per step: `_next_entries` gives whole steps, in order."""
        for step, those in groupby(records, key=lambda record: record.step):
            self._log_row(step, build_row(list(those)))

    def end(self) -> None:
        """Send the summary, the lens's results and the artifacts, then require that W&B has everything."""
        if shown := build_lens_media(self.run):
            self._log_row(self._last, shown)
        kept = {key: value for key, value in self.run.summary.items() if key not in OWN_RUN_KEYS}
        self._run.summary.update(kept)
        for artifact in build_artifacts(self.run, self.wandb_id):
            self._run.log_artifact(artifact)
        self._finish_run()

    def close(self) -> None:
        """End the client's process; the next one sends what this one did not."""
        self._held = []
        if self._begun:
            import wandb

            self._run, self._begun = None, False
            with suppress(Exception):  # it may be dead
                wandb.teardown(exit_code=1)

    def _next_entries(self) -> list[tuple[str, JournalEntry]]:
        """The entries of whole steps: those that every journal has been read past."""
        while new := super()._next_entries():
            self._held = sorted([*self._held, *new], key=lambda named: named[1].step)
            full = [name for name in self._readers if sum(named[0] == name for named in new) == BATCH[name]]
            # Below this step all entries are read: the metrics have a line per step, and are read first.
            through = min(self._readers[name].position.step for name in ("metrics", *full))
            if count := sum(entry.step < through for _, entry in self._held):
                whole, self._held = self._held[:count], self._held[count:]
                return whole
        rest, self._held = (self._held, []) if self._ended else ([], self._held)
        return rest

    def _end_key(self) -> str:
        """The end is another one after each evaluation, which is sent once W&B has finished the run again."""
        evaluations = self.run.folder.evaluations_file
        lines = len(read_metrics(evaluations)) if evaluations.is_file() else 0
        return f"{super()._end_key()}-{lines}" if lines else super()._end_key()

    def _save_positions(self, **more: Any) -> None:
        """Save positions at the end only: W&B may lose the rows of an unfinished run."""
        if more:
            super()._save_positions(shift=self._shift, **more)

    def open(self) -> None:
        import wandb

        self._stopped.clear()
        kept = self.cursor.load()
        if unfinished := kept.pop("unfinished", None):
            shutil.rmtree(unfinished, ignore_errors=True)
        self._last = max((step for step, _ in kept.get("positions", {}).values()), default=-1)
        self._shift = kept.get("shift", 0)
        folder = self._client_folder
        folder.mkdir(parents=True, exist_ok=True)
        # The client's folders can be set by environment variables only; in the home folder they would stay forever.
        os.environ |= {"WANDB_DATA_DIR": str(folder / "data"), "WANDB_CACHE_DIR": str(folder / "cache")}
        logging.getLogger("wandb").disabled = True  # on a full disk, its log file gives a traceback per line
        self._begun = True
        with _explain_errors(wandb):
            self._run = wandb.init(
                id=self.wandb_id, resume="allow", reinit="create_new", dir=str(folder), config=self.run.settings,
                mode=self.settings.mode, project=self.settings.project, entity=self.settings.entity,
                group=self.settings.group or self.run.sweep, name=self.settings.name or self.run.run_id,
                tags=self.settings.tags, settings=self._client_settings(wandb),
            )  # fmt: skip
        self.cursor.save({**kept, "unfinished": self._run.settings.sync_dir})
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _client_settings(self, wandb: Any) -> Any:
        """The client's settings: quiet, without code, git and machine data, except the training process's own use."""
        pid, stopped = None, self._stopped
        with suppress(CheckpointError, KeyError, TypeError):
            pid = int(self.run.folder.read_metadata(PROCESS)["pid"]) if self.run.status == "running" else None
        return wandb.Settings(
            init_timeout=INIT_SECONDS, finish_timeout_raises=True,
            finish_timeout=max(LEAST_FINISH_SECONDS, self.run.config.tracking.wait_seconds),
            console="off", silent=True, quiet=True, save_code=False, disable_code=True, disable_git=True,
            disable_job_creation=True, label_disable=True, host="", stop_on_fatal_error=True,
            stop_fn=lambda: stopped.set(), x_disable_meta=True, x_save_requirements=False,
            x_disable_stats=pid is None, x_stats_pid=pid or os.getpid(), x_stats_disk_paths=[],
            x_stats_coreweave_metadata_base_url=NO_METADATA,
        )  # fmt: skip

    @property
    def _client_folder(self) -> Path:
        """The folder that the client writes to: of offline runs, or of files to be deleted once they are online."""
        if self.settings.mode == "online":
            return self.run.tracking_folder(self.name).absolute() / "online"
        return Path(self.settings.folder or self.run.tracking_folder(self.name)).absolute()

    def _log_row(self, step: int, values: dict[str, Any]) -> None:
        """Log a row. W&B's step must grow: it is the training step, plus one for each row that came late."""
        self._shift += step <= self._last
        self._last = max(step, self._last)
        self._run.log(values | {"step": step}, step=self._last + self._shift, commit=True)
        if self._stopped.is_set():
            raise IntegrationError("W&B accepts no more of this run.")

    def _finish_run(self) -> None:
        """Finish the run; raises unless W&B has everything."""
        import wandb

        folder, step = Path(self._run.settings.sync_dir), self._last + self._shift
        with _explain_errors(wandb):
            self._run.finish(exit_code=0 if self.run.status == "finished" else 1)
        if self._stopped.is_set():
            raise IntegrationError("W&B did not accept all of this run.")
        if self.settings.mode == "offline":
            require_written(folder, step)
        else:
            shutil.rmtree(self._client_folder, ignore_errors=True)
        kept = self.cursor.load()
        kept.pop("unfinished", None)
        self.cursor.save(kept)


def build_wandb_id(experiment: str, run_id: str) -> str:
    """W&B's id of a run: of valid characters, and unique to the experiment."""
    known = hashlib.sha256(f"{experiment}/{run_id}".encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', run_id)[:64]}-{known[:6]}"


@contextmanager
def _explain_errors(wandb: Any) -> Iterator[None]:
    """Turns the client's errors into ours, which say what to do."""
    try:
        yield
    except TimeoutError as error:
        raise IntegrationError(
            f"W&B did not accept all of the run in time ({strip_full_stop(describe_error(error))})."
        ) from error
    except wandb.errors.Error as error:
        why = strip_full_stop(describe_error(error))
        if isinstance(error, wandb.errors.AuthenticationError) or REFUSED.search(str(error)):
            raise IntegrationError(
                f"W&B rejects the key, or denies it write access ({why}). Run `wandb login`, or set WANDB_API_KEY, and "
                "see tracking.wandb.entity.",
                lasting=True,
            ) from error
        lasting = isinstance(error, wandb.errors.UsageError)
        raise IntegrationError(f"W&B cannot start or finish the run ({why}).", lasting=lasting) from error


def require_written(folder: Path, step: int) -> None:
    """Read an offline run back with W&B's own reader: on a full disk its writer silently drops records."""
    from wandb.util import get_core_path

    (file,) = folder.glob("run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "--summary", "--json", "--no-observability", "--run-file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INIT_SECONDS, check=False)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise IntegrationError(f"{file} cannot be read back ({done.stderr.strip()[-200:]}).") from None
    if found["exit_code"] is None or found["step"] != step:
        raise IntegrationError(f"{file} is incomplete: is the disk full? It is written again.")


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
