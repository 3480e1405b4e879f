"""The Hugging Face hub: pushes a run's adapter, card, tokenizer, record and checkpoints to a repository."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from training_lens.errors import CheckpointError, IntegrationError
from training_lens.integrations.delivery import LONGEST_PAUSE, Cursor, Integration, lock_integration
from training_lens.integrations.hub_files import (
    PathShortener,
    PushedFile,
    PushPlan,
    build_adapter_files,
    build_checkpoint_files,
    build_metadata_files,
    plan_push,
    read_file_stats,
)
from training_lens.integrations.model_card import render_model_card
from training_lens.integrations.record import RunRecord, hash_values
from training_lens.integrations.repository import Repository
from training_lens.runs.checkpoint_format import list_checkpoints
from training_lens.utils.formatting import pluralize
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
TRIES = 5  # of `push`, until it gives up


@dataclass(frozen=True)
class DueFiles:
    """What of a run is to be in the repository now."""

    adapter: bool
    checkpoints: tuple[Path, ...]

    def describe_files(self) -> str:
        """A description for people; empty if nothing is due."""
        parts = ["the adapter and its card"] if self.adapter else []
        parts += [pluralize(len(self.checkpoints), "checkpoint")] if self.checkpoints else []
        return ", ".join(parts)


@dataclass(frozen=True)
class PushResult:
    """The result of a push: its plan, and the commit's URL (empty if there was nothing to send)."""

    plan: PushPlan
    url: str


class HuggingFaceIntegration(Integration):
    """Pushes a run to the repository of its config, `tracking.hub.*`.

    A finished run: the adapter, the tokenizer, a model card, and the run's record in training_lens/. With
    `tracking.hub.checkpoints`, also its checkpoints, during training, in training_lens_checkpoints/. Files that the
    repository has, by their hashes, are not sent again. A push is one commit.

    Example:
        run = RunRecord(RunFolder(path), {"tracking": {"hub": {"repo": "owner/name"}}})
        hub = HuggingFaceIntegration(run)
        [file.path for file in hub.plan().send]   # what a push would send; sends nothing
        hub.push().url
    """

    name: ClassVar[str] = "hub"

    def __init__(self, run: RunRecord) -> None:
        self.run = run
        options = run.config.tracking.hub
        assert options.repo is not None, "configured with a repository"
        self.repo, self._options = options.repo, options
        self._repository = Repository(self.repo, options.revision, options.private)
        self._cursor_key = f"{self.repo}@{options.revision or 'main'}"
        self.cursor = Cursor(run.tracking_folder(self.name) / "cursor.json")

    def require(self) -> None:
        Repository.require_token()

    def deliver(self, ended: bool) -> None:
        due = self._find_due(finished=ended and self.run.status == "finished")
        if not self._is_sent(due):
            try:
                self._send_due(due)
            except Exception:  # a vanished file has several exception types
                if all(folder.is_dir() for folder in due.checkpoints):
                    raise
                logger.debug("a checkpoint was deleted while it was sent; planning again")
                self.deliver(ended)

    def outstanding(self) -> str:
        due = self._find_due(finished=self.run.status == "finished")
        return "" if self._is_sent(due) else due.describe_files()

    def plan(self) -> PushPlan:
        """What `push` would do, without changing anything; with token and network, compared with the repository."""
        wanted = self._build_files(self._require_files())
        try:
            self.require()
            if (remote := self._repository.list_files()) is not None:
                self._warn_of_visibility()
            return plan_push(wanted, remote or {})
        except IntegrationError as error:
            return PushPlan(tuple(wanted), unknown=str(error))

    def push(self) -> PushResult:
        """Send the adapter, its card and record, and with `tracking.hub.checkpoints` the checkpoints.

        Retries for about a minute if the service is busy or away; another call continues where this one stopped.

        Raises:
            CheckpointError: the run has nothing to push.
            IntegrationError: it cannot be sent; says why and what to do.
        """
        due = self._require_files()
        self.require()
        with lock_integration(self.run.tracking_folder(self.name)):
            for attempt in range(TRIES - 1):
                try:
                    return self._send_due(due)
                except IntegrationError as error:
                    if error.lasting:
                        raise
                    pause = min(LONGEST_PAUSE, max(2.0**attempt, error.retry_after or 0.0))
                    logger.warning("%s Trying again in %g s.", error, pause)
                    time.sleep(pause)
            return self._send_due(due)

    def _require_files(self) -> DueFiles:
        """What is due when a user asks for a push."""
        finished = self.run.status == "finished"
        due = self._find_due(finished)
        if not finished and not due.checkpoints:
            raise CheckpointError(
                f"the run {self.run.run_id} is {self.run.status} and has no adapter to push. Finish it (training-lens "
                "train --resume), or push what checkpoints it has (--checkpoints)."
            )
        return due

    def _find_due(self, finished: bool) -> DueFiles:
        folders = list_checkpoints(self.run.folder.checkpoints) if self._options.checkpoints else []
        return DueFiles(finished, tuple(folders))

    def _build_files(self, due: DueFiles) -> list[PushedFile]:
        names = PathShortener(self.run)
        files: list[PushedFile] = []
        if due.adapter:
            card = render_model_card(self.run, names, self.repo, self._options.revision)
            files = [*build_adapter_files(self.run, names), PushedFile("README.md", card.encode())]
            files += build_metadata_files(self.run, names)
        return files + [file for folder in due.checkpoints for file in build_checkpoint_files(folder, names)]

    def _send_due(self, due: DueFiles) -> PushResult:
        """Bring the repository up to date in one commit, and remember that."""
        state, repository, url = self._hash_state(due), self._repository, ""
        remote = repository.list_files()
        plan = plan_push(self._build_files(due), remote or {})
        if not plan.is_done:
            if remote is None:
                repository.create_repository()
            self._warn_of_visibility()
            url = repository.commit_plan(plan, f"{self.run.run_id}: {due.describe_files()}")
            logger.debug("sent %d files in %s", len(plan.send), url)
        self.cursor.save({**self.cursor.load(), self._cursor_key: state})
        return PushResult(plan, url)

    def _warn_of_visibility(self) -> None:
        """Warn if an existing repository is more or less visible than the config asks for."""
        if (private := self._repository.is_private()) != self._options.private:
            seen = "private" if private else "public: everyone sees what is sent there"
            logger.warning("%s exists already, and stays %s", self.repo, seen)

    def _is_sent(self, due: DueFiles) -> bool:
        return not due.describe_files() or self.cursor.load().get(self._cursor_key) == self._hash_state(due)

    def _hash_state(self, due: DueFiles) -> str:
        return hash_values(read_file_stats(self.run, due.checkpoints, due.adapter))
