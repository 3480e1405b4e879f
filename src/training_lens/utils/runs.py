"""Run folders: where a run keeps everything, and how a run is found again.

{base}/experiments/{experiment}/runs/{run_id}/{artifacts,checkpoints,lens,logs,metadata,reports}
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.utils.files import read_json
from training_lens.utils.formatting import nearest

LATEST = "latest"


def new_run_id() -> str:
    """A UTC timestamp with a short random tail; sorts by time: '20261120T203605Z-5f3a'."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    root: Path

    @property
    def run_id(self) -> str:
        return self.root.name

    @property
    def adapter(self) -> Path:
        return self.root / "artifacts" / "adapter"

    @property
    def tokenizer(self) -> Path:
        return self.root / "artifacts" / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def metadata(self) -> Path:
        return self.root / "metadata"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def metrics(self) -> Path:
        return self.logs / "metrics.jsonl"

    def create(self) -> RunFolder:
        """Make the run's folders.

        Raises:
            ConfigurationError: see `require_new`.
        """
        self.require_new()
        for folder in (self.checkpoints, self.logs, self.metadata, self.reports):
            folder.mkdir(parents=True)
        return self

    def require_new(self) -> None:
        """Refuse to begin a run here twice.

        Raises:
            ConfigurationError: a run of that id is there already; it is never written over.
        """
        if self.root.exists():
            raise ConfigurationError(
                f"output.run_id: the run '{self.run_id}' exists already at {self.root}. "
                f"Give another id, or continue it with --resume {self.run_id}."
            )

    def read_metadata(self, name: str) -> Any:
        """The content of metadata/{name}.

        Raises:
            CheckpointError: the file is missing or no JSON.
        """
        path = self.metadata / name
        try:
            return read_json(path)
        except FileNotFoundError:
            raise CheckpointError(f"{self.root} is no complete run: {path} is missing.") from None
        except ValueError as error:
            raise CheckpointError(f"{path} is no valid JSON ({error}). Restore it, or start a new run.") from error

    @property
    def status(self) -> str:
        """running, finished, failed, interrupted or pruned, as the run itself wrote it last."""
        return str(self.read_metadata("summary.json").get("status", "unknown"))


def runs_folder(base_output_dir: str, experiment_name: str) -> Path:
    return Path(base_output_dir) / "experiments" / experiment_name / "runs"


def find_run(reference: str, base_output_dir: str, experiment_name: str, *, finished: bool) -> RunFolder:
    """The run that `reference` means: `latest`, a run id of the experiment, or a path to a run folder.

    Args:
        finished: whether `latest` is the newest finished run (to use it) or the newest unfinished (to resume it).

    Raises:
        CheckpointError: there is no such run; lists what is there.
    """
    folder = runs_folder(base_output_dir, experiment_name)
    runs = sorted((RunFolder(p) for p in folder.glob("*/") if (p / "metadata").is_dir()), key=lambda run: run.run_id)
    if reference == LATEST:
        matching = [run for run in runs if (_status(run) == "finished") == finished]
        if not matching:
            kind = "finished" if finished else "unfinished"
            raise CheckpointError(
                f"no {kind} run in {folder} ({len(runs)} runs there). "
                "Give output.base_output_dir and output.experiment_name if it is elsewhere, or the run's path."
            )
        return matching[-1]
    for candidate in (folder / reference, Path(reference)):
        if (candidate / "metadata").is_dir():
            return RunFolder(candidate)
    beside = [str(p) for p in Path(reference).parent.glob("*/")] if "/" in reference else []
    close = nearest(reference.rstrip("/"), [LATEST, *(run.run_id for run in runs), *beside])
    hint = f" Did you mean {close}?" if close else ""
    raise CheckpointError(f"no run '{reference}' in {folder}, and no run folder at that path.{hint}")


def _status(run: RunFolder) -> str:
    try:
        return run.status
    except CheckpointError:
        return "unknown"
