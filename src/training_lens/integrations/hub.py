"""The Hugging Face hub: a run's adapter with its card, tokenizer and record, and its checkpoints, in a repository."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from training_lens.errors import CheckpointError, IntegrationError
from training_lens.integrations.delivery import LONGEST_PAUSE, Cursor, Integration, alone
from training_lens.integrations.hub_files import (
    Names,
    PushedFile,
    PushPlan,
    adapter_files,
    checkpoint_files,
    metadata_files,
    plan_push,
    run_state,
)
from training_lens.integrations.model_card import model_card
from training_lens.integrations.record import RunRecord
from training_lens.integrations.repository import Repository
from training_lens.runs.checkpoint_format import list_checkpoints
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
TRIES = 5  # of `push`, until it gives up


@dataclass(frozen=True)
class Due:
    """What of a run belongs into the repository now."""

    adapter: bool
    checkpoints: tuple[Path, ...]

    def words(self) -> str:
        """For people; empty where nothing is due."""
        count = len(self.checkpoints)
        parts = ["the adapter and its card"] if self.adapter else []
        parts += [f"{count} checkpoint{'s' * (count > 1)}"] if count else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Pushed:
    """What a push did: its plan, the commit's URL (empty where nothing was to be sent), and the repository's name."""

    plan: PushPlan
    url: str
    repo: str


class HuggingFaceIntegration(Integration):
    """Pushes a run to the repository that its config names: `tracking.hub.*`.

    At the end of a finished run: the adapter, the tokenizer, a model card, and the run's record in training_lens/. With
    `tracking.hub.checkpoints`, while it trains, its checkpoints in training_lens_checkpoints/. What belongs together is
    one commit. What the repository has already, by its hashes, is not sent again.

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
        self.cursor = Cursor(run.place(self.name) / "cursor.json")

    def require(self) -> None:
        Repository.require()

    def deliver(self, ended: bool) -> None:
        due = self._due(finished=ended and self.run.status == "finished")
        if not self._is_sent(due):
            try:
                self._send(due)
            except Exception:  # the client tells a file that vanished in several ways
                if all(folder.is_dir() for folder in due.checkpoints):
                    raise
                logger.debug("a checkpoint was thinned out while it was sent; planned anew")
                self.deliver(ended)

    def outstanding(self) -> str:
        due = self._due(finished=self.run.status == "finished")
        return "" if self._is_sent(due) else due.words()

    def plan(self) -> PushPlan:
        """What `push` would do, changing nothing anywhere: with a token and network, against what the repository has.

        Raises:
            CheckpointError: the run has nothing to push.
        """
        wanted = self._files(self._pushable())
        try:
            self.require()
            repository = self._repository()
            if (remote := repository.files()) is not None:
                self._tell_visibility(repository)
            return plan_push(wanted, remote or {})
        except IntegrationError as error:
            return PushPlan(tuple(wanted), unknown=str(error))

    def push(self) -> Pushed:
        """Send the adapter, its card and record, and with `tracking.hub.checkpoints` the checkpoints.

        Tries again, for a minute or so, where the service is busy or away; a further call goes on where it stopped.

        Raises:
            CheckpointError: the run has nothing to push.
            IntegrationError: what keeps it from being sent, and what to do.
        """
        due = self._pushable()
        self.require()
        with alone(self.run.place(self.name)):
            for attempt in range(TRIES - 1):
                try:
                    return self._send(due)
                except IntegrationError as error:
                    if error.lasting:
                        raise
                    pause = min(LONGEST_PAUSE, max(2.0**attempt, error.retry_after or 0.0))
                    logger.warning("%s Trying again in %g s.", error, pause)
                    time.sleep(pause)
            return self._send(due)

    def _repository(self) -> Repository:
        return Repository(self.repo, self._options.revision, self._options.private)

    def _pushable(self) -> Due:
        """What is due when a user asks for it."""
        finished = self.run.status == "finished"
        due = self._due(finished)
        if not finished and not due.checkpoints:
            raise CheckpointError(
                f"the run {self.run.run_id} is {self.run.status} and has no adapter to push. Finish it (training-lens "
                "train --resume), or push what checkpoints it has (--checkpoints)."
            )
        return due

    def _due(self, finished: bool) -> Due:
        folders = list_checkpoints(self.run.folder.checkpoints) if self._options.checkpoints else []
        return Due(finished, tuple(folders))

    def _files(self, due: Due) -> list[PushedFile]:
        names = Names(self.run)
        files: list[PushedFile] = []
        if due.adapter:
            card = model_card(self.run, names, self.repo, self._options.revision)
            files = [*adapter_files(self.run, names), PushedFile("README.md", card.encode())]
            files += metadata_files(self.run, names)
        return files + [file for folder in due.checkpoints for file in checkpoint_files(folder, names)]

    def _send(self, due: Due) -> Pushed:
        """Bring the repository up to date in one commit, and remember that it is."""
        state, repository = self._state(due), self._repository()
        remote = repository.files()
        plan = plan_push(self._files(due), remote or {})
        url = ""
        if not plan.is_done:
            if remote is None:
                repository.create()
            self._tell_visibility(repository)
            url = repository.commit(plan, f"{self.run.run_id}: {due.words()}")
            logger.debug("sent %d files in %s", len(plan.send), url)
        self.cursor.save({**self.cursor.load(), self._place: state})
        return Pushed(plan, url, self.repo)

    def _tell_visibility(self, repository: Repository) -> None:
        """Say so where one that is there already is seen by others than the config asks for a new one."""
        if (private := repository.is_private()) != self._options.private:
            seen = "private" if private else "public: everyone sees what is sent there"
            logger.warning("%s is there already, and stays %s", self.repo, seen)

    @property
    def _place(self) -> str:
        return f"{self.repo}@{self._options.revision or 'main'}"

    def _is_sent(self, due: Due) -> bool:
        return not due.words() or self.cursor.load().get(self._place) == self._state(due)

    def _state(self, due: Due) -> str:
        values = run_state(self.run, due.checkpoints, due.adapter)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
