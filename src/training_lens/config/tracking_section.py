"""Where a run is shown besides its folder: trackers and the hub. Credentials come from the environment alone."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from training_lens.config.section import Place, Section, setting


def _check_repo_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value, re.ASCII):
        raise ValueError(
            f"{value!r} is no repository of the hub; give owner/name, of letters, digits, '-', '_' and '.'"
        )
    return value


RepoName = Annotated[str, AfterValidator(_check_repo_name)]


class WandBSection(Section):
    """Weights & Biases. Its key is read from WANDB_API_KEY or `wandb login`."""

    mode: Literal["disabled", "online", "offline"] = setting(
        "disabled", "offline: kept in the run's folder, to be sent with training-lens sync or wandb sync"
    )
    project: str = setting("training-lens", "the project of the run", min_length=1)
    entity: str | None = setting(None, "user or team; null: the default of your account")
    group: str | None = setting(None, "runs shown together; null: the sweep of a trial, none for others")
    name: str | None = setting(None, "of the run; null: its run id")
    tags: list[str] = setting([], "of the run")
    folder: Place | None = setting(None, "where offline runs are written; null: the run's tracking folder")


class MlflowSection(Section):
    """MLflow: a local database, or a server."""

    enabled: bool = setting(False, "send the run to MLflow")
    uri: str | None = setting(
        None, "tracking URI; null: MLFLOW_TRACKING_URI, or else the file mlflow.db in output.base_output_dir"
    )
    experiment: str | None = setting(None, "null: output.experiment_name")


class TrackioSection(Section):
    """trackio: a local dashboard with the interface of W&B."""

    enabled: bool = setting(False, "send the run to trackio")
    project: str | None = setting(None, "null: output.experiment_name")
    folder: Place | None = setting(None, "of its database; null: trackio in output.base_output_dir")


class HubSection(Section):
    """The Hugging Face hub. Its token is read from HF_TOKEN or `hf auth login`."""

    repo: RepoName | None = setting(None, "owner/name to which the finished adapter is pushed; null: none")
    private: bool = setting(True, "whether a new repository is private")
    checkpoints: bool = setting(
        False, "push checkpoints while training runs, to training_lens_checkpoints/ in the repository"
    )
    revision: str | None = setting(None, "branch to push to; null: the default branch")


class TrackingSection(Section):
    """Where a run is shown besides its folder. None can end a run, or make it wait: what one misses, `sync` sends."""

    tensorboard: bool = setting(True, "write TensorBoard events to the run's logs folder")
    wandb: WandBSection = WandBSection()
    mlflow: MlflowSection = MlflowSection()
    trackio: TrackioSection = TrackioSection()
    hub: HubSection = HubSection()
    custom: dict[str, dict[str, Any]] = setting(
        {}, "your own trackers and their options, such as {my_module.MyTracker: {channel: x}}"
    )
    samples: int = setting(4, "prompts answered greedily at every validation, in logs/samples.jsonl; 0: none", ge=0)
    sample_tokens: int = setting(48, "most new tokens of such an answer", ge=1)
    histograms_every: int | None = setting(
        200, "histograms of the adapter's weights and gradients every so many steps; null: none", ge=1
    )
    send_seconds: float = setting(2.0, "what is new is sent at least so often", gt=0)
    wait_seconds: float = setting(300.0, "most seconds that the end of a run waits for what is not sent yet", ge=0)

    @property
    def has_display(self) -> bool:
        """Whether any tracker is on that can show samples and histograms."""
        services = (self.wandb.mode != "disabled", self.mlflow.enabled, self.trackio.enabled)
        return any((self.tensorboard, *services, self.custom))
